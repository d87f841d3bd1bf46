"""Adapters as nodes of the cache's tree: registered, placed on the host, loaded, dropped."""

from __future__ import annotations

from elora_sglang.core.executor import Executor
from elora_sglang.core.tree.node import Node
from elora_sglang.runtime.host_tier import HostTier
from elora_sglang.runtime.lora_pool import LoRAPool


class TreeAdapters:
    """The adapters of one cache.

    Args:
        executor: carries out what the cache manager decides.
        tier: the host tier; ``None`` without one.
        weights: the LoRA pool, whose adapters live in slots of the cache's allocator.
    """

    def __init__(self, executor: Executor, tier: HostTier | None, weights: LoRAPool) -> None:
        self._executor, self._manager, self._tier = executor, executor.manager, tier
        self._weights = weights
        self._id_lengths: set[int] = set()
        self._seen: set[str] = set()

    def node(self, lora_id: str | None) -> Node:
        """The node of adapter ``lora_id`` (``None``: the base model), registered on first use."""
        tree = self._manager.tree
        if lora_id is None:
            return tree.base
        node = tree.adapter(lora_id)
        if node is None:
            self._id_lengths.add(len(lora_id))
            node = self._manager.register(
                lora_id, self._weights.slots_needed(lora_id), pinned=self._weights.is_pinned(lora_id)
            )
        return node

    def named_at_end(self, extra_key: str) -> Node:
        """The node of the adapter whose id ends ``extra_key``, where SGLang puts it; the base model's if none does.

        Ambiguous for a base request that sends an adapter's id as its own extra key.
        """
        tree = self._manager.tree
        named = (tree.adapter(extra_key[-size:]) for size in self._id_lengths if size <= len(extra_key))
        return next((node for node in named if node is not None), tree.base)

    def drop(self, lora_id: str) -> None:
        """Unload: the whole branch leaves both tiers, what is in use as soon as its last request ends.

        Idempotent; an unknown adapter is no error, because SGLang retries incomplete unloads.
        """
        if self._manager.tree.adapter(lora_id) is not None:
            self._executor.run(self._manager.unregister(lora_id))

    def place_new(self) -> None:
        """What SGLang has just loaded goes from its CPU tensors into the host pool, or back to its file.

        Mutates tree and host pool. Without a host tier the CPU tensors stay.
        """
        tier, store = self._tier, self._weights.store
        if tier is None:
            return
        loaded = self._weights.loaded()
        if loaded == self._seen:
            return
        self._seen = set(loaded)
        for lora_id in store.in_memory():
            node = self.node(lora_id)
            slots = None if node.host else tier.host.alloc(node.size)
            if slots is None:
                store.drop_cpu_tensors(lora_id)
                continue
            store.read_into_host(lora_id, slots)
            self._manager.place_on_host(node, slots)

    def forget(self) -> None:
        """A flush: no adapter is on a tier any more, and what :meth:`place_new` has not seen falls back to its file."""
        self._weights.drop_all()
        if self._tier is not None:
            for lora_id in self._weights.store.in_memory():
                self._weights.store.drop_cpu_tensors(lora_id)
