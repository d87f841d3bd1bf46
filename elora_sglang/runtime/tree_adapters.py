"""Adapters as nodes of the cache's tree: registered, placed on the host, loaded, dropped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from elora_sglang.core.tree.node import Node
from elora_sglang.runtime.adapters.files import AdapterError

if TYPE_CHECKING:
    from elora_sglang.integration.weights.pool import EloraLoRAMemoryPool
    from elora_sglang.runtime.swap_driver import SwapDriver


class TreeAdapters:
    """The adapters of one cache.

    Args:
        driver: executes what the cache manager decides, and knows both tiers.
        weights: the LoRA pool, whose adapters live in slots of the driver's allocator.
        order: orders what comes next on the current stream behind the last launched forward.
    """

    def __init__(self, driver: SwapDriver, weights: EloraLoRAMemoryPool, order: Callable[[], None]) -> None:
        self._driver, self._manager = driver, driver.manager
        self._weights = weights
        self._order = order
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

    def load(self, node: Node) -> bool:
        """Give a non-resident adapter its slots and bring its weights there. Mutates pool and tree.

        From the host if it is there, else from its file. Evicts what it must. Returns False, with nothing
        changed but evictions, when even that does not free enough.

        Raises:
            AdapterError: it has to be read, and its file is gone, broken or has other content.
        """
        driver, allocator = self._driver, self._driver.allocator
        if node.clean:
            load = self._manager.load_for(node)
            if load is not None and driver.load(load):
                return True
        driver.make_room(node.size)
        slots = allocator.alloc(node.size)
        if slots is None:
            return False
        # alloc returns a view of the whole free list; an adapter lies in ascending slots, as its host copy does.
        slots = slots.to(torch.int64, copy=True).sort().values
        self._order()
        if driver.tier is not None:
            driver.tier.engine.wait_for_slots(slots)  # a save may still read what was evicted a moment ago
        try:
            self._weights.load(node.key, slots)
        except AdapterError:
            allocator.free_segment(slots, start_pos=0)
            raise
        self._manager.make_resident(node, slots)
        driver.stats.adapter_loads += 1
        driver.stats.adapter_slots_loaded += node.size
        return True

    def drop(self, lora_id: str) -> None:
        """Unload: the whole branch leaves both tiers, what is in use as soon as its last request ends.

        Idempotent; an unknown adapter is no error, because SGLang retries incomplete unloads.
        """
        if self._manager.tree.adapter(lora_id) is not None:
            self._driver.execute(self._manager.unregister(lora_id))

    def place_new(self) -> None:
        """What SGLang has just loaded goes from its CPU tensors into the host pool, or back to its file.

        Mutates tree and host pool. Without a host tier the CPU tensors stay.
        """
        tier, store = self._driver.tier, self._weights.store
        if tier is None:
            return
        loaded = self._weights.manager.loras.keys()
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
        if self._driver.tier is not None:
            for lora_id in self._weights.store.in_memory():
                self._weights.store.drop_cpu_tensors(lora_id)
