"""SGLang's prefix cache, backed by the dependency tree of :mod:`elora_sglang.core`.

The tree decides, this class executes: it turns SGLang's calls into tree operations, keeps the slot
tensors, gives victims' slots back to the allocator and tells the LoRA pool which adapters left.
Every KV node hangs below the node of its adapter, and a miss returns that adapter node, so
SGLang's own ``lock(req.last_node)`` pins root, adapter and KV in one go.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    DecLockRefParams,
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    MatchPrefixParams,
    MatchResult,
)

from elora_sglang.core.node import Node
from elora_sglang.core.policy import create_policy
from elora_sglang.core.tree import DependencyTree, Victim
from elora_sglang.integration import config, verify
from elora_sglang.integration.auditor import Auditor
from elora_sglang.runtime.slots import SlotPayloads

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

    from elora_sglang.integration.admission import EloraPrefillAdder
    from elora_sglang.integration.lora_pool import EloraLoRAMemoryPool


def create(ctx: TreeCacheBuildContext) -> EloraRadixCache:
    """Factory registered as radix-cache backend ``elora`` (SGLang: ``mem_cache/registry.py``).

    Runs in every scheduler process, after all hooks were applied, which makes it the place where a
    hook that SGLang silently failed to apply is noticed: it raises, and the server does not start.
    """
    settings = config.current(ctx.server_args)
    verify.require_hooks(settings)
    if ctx.params.enable_kv_cache_events:
        raise SystemExit("elora: --kv-events-config is not supported with --elora; remove it.")
    runner = ctx.tp_worker.model_runner
    return EloraRadixCache(
        ctx.params,
        weights=runner.lora_manager.memory_pool,
        policy=settings.policy,
        forward_stream=getattr(runner, "forward_stream", None),
        audit_interval=settings.audit_interval,
    )


def _namespace(extra_key: str | None, cache_salt: str | None) -> Hashable:
    """Cache namespace below an adapter. SGLang puts the adapter id at the end of ``extra_key``;
    it is harmless here, because the adapter itself comes from the request, never from this string."""
    return None if extra_key is None and not cache_salt else (extra_key, cache_salt or None)


class EloraRadixCache(BasePrefixCache):
    """Prefix cache over one dependency tree that holds adapters *and* KV in the same slot pool.

    Args:
        params: SGLang's construction arguments (pools, page size, metrics switch).
        weights: the LoRA memory pool whose adapters live in slots of this cache's allocator.
        policy: name of an eviction policy in :mod:`elora_sglang.core.policies`.
        forward_stream: CUDA stream of model forwards; adapter loads are ordered behind it.
        audit_interval: audit the pool every so many scheduler ticks; 0 switches the auditor off.
    """

    disable = False

    def __init__(
        self,
        params: CacheInitParams,
        *,
        weights: EloraLoRAMemoryPool,
        policy: str = "lru",
        forward_stream: Any = None,
        audit_interval: int = 0,
    ) -> None:
        self.req_to_token_pool = params.req_to_token_pool
        self.token_to_kv_pool_allocator = params.token_to_kv_pool_allocator
        self.page_size = params.page_size
        self.is_eagle = params.is_eagle
        self.weights = weights
        self.device = self.token_to_kv_pool_allocator.device
        self._forward_stream = forward_stream
        self._no_slots = torch.empty((0,), dtype=torch.int64, device=self.device)
        self._payloads = SlotPayloads()
        self.tree = DependencyTree(self.page_size, create_policy(policy), self._payloads)
        self._matched_adapter: Node = self.tree.base
        self._id_lengths: set[int] = set()
        #: The prefill pass in progress; set by EloraPrefillAdder.
        self.current_adder: EloraPrefillAdder | None = None
        self.stats = CacheStats()
        self.auditor = Auditor(self, interval=audit_interval) if audit_interval else None
        if params.enable_metrics:
            self.init_metrics_collector()

    # -- adapters -----------------------------------------------------------------------------

    def adapter_node(self, lora_id: str | None) -> Node:
        """The node of adapter ``lora_id`` (``None``: the base model), registered on first use."""
        if lora_id is None:
            return self.tree.base
        node = self.tree.adapter(lora_id)
        if node is None:
            self._id_lengths.add(len(lora_id))
            node = self.tree.register_adapter(
                lora_id, self.weights.slots_needed(lora_id), pinned=self.weights.is_pinned(lora_id)
            )
        return node

    def load_adapter(self, node: Node) -> bool:
        """Give a non-resident adapter its slots and write its weights there. Mutates pool and tree.

        Evicts what it must. Returns False, with nothing changed but evictions, when even that does
        not free enough; the caller has then promised slots that do not exist.
        """
        allocator = self.token_to_kv_pool_allocator
        shortfall = node.size - allocator.available_size()
        if shortfall > 0:
            self.evict(EvictParams(num_tokens=shortfall))
        slots = allocator.alloc(node.size)
        if slots is None:
            return False
        slots = slots.to(torch.int64, copy=True)  # alloc returns a view of the whole free list
        self._order_behind_forward()
        self.weights.load(node.key, slots)
        self.tree.make_resident(node, slots)
        self.stats.adapter_loads += 1
        self.stats.adapter_slots_loaded += node.size
        return True

    def drop_adapter(self, lora_id: str) -> None:
        """Unload: the whole branch leaves, what is in use as soon as its last request ends.

        Idempotent; an unknown adapter is no error, because SGLang retries incomplete unloads.
        """
        node = self.tree.adapter(lora_id)
        if node is not None:
            self._release(self.tree.drop_branch(node).victims)

    def _order_behind_forward(self) -> None:
        # The last launched batch may still write KV into slots that were freed a moment ago: with
        # the overlap scheduler 4-31 % of adapter loads in a prototype landed on such slots.
        if self._forward_stream is not None and self.weights.on_cuda:
            torch.cuda.current_stream().wait_stream(self._forward_stream)

    def _release(self, victims: list[Victim]) -> int:
        """Give the victims' slots back to the allocator; returns their number of slots."""
        freed = 0
        for victim in victims:
            if victim.kind == "adapter":
                self.weights.drop(victim.key, victim.payload)
                self.stats.adapter_evictions += 1
            else:
                self.stats.kv_evictions += 1
                self.stats.kv_tokens_evicted += victim.size
            # A payload is whole pages in row order, whatever its owner was.
            self.token_to_kv_pool_allocator.free_segment(victim.payload, start_pos=0)
            freed += victim.size
        return freed

    # -- SGLang's contract ----------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything. SGLang clears the allocator itself right afterwards, so no slot is freed."""
        self.weights.drop_all()
        self.tree.reset()
        self._matched_adapter = self.tree.base

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Longest resident prefix of the request below its adapter; may split a node."""
        if params.req is None:
            raise ValueError(
                "elora: match_prefix without a request cannot know its adapter; "
                "the feature that calls it this way is not supported with --elora"
            )
        key = params.key
        lora_id = params.req.lora_id
        if lora_id is not None and not self.weights.is_loaded(lora_id):
            # Not ours to serve: no KV at all. Admission turns the request away before it could run.
            return MatchResult(0, self.tree.base, self.tree.base, self.tree.base)
        adapter = self.adapter_node(lora_id)
        self._matched_adapter = adapter
        match = self.tree.match(
            adapter, key.token_ids, _namespace(key.extra_key, key.cache_salt), limit=len(key)
        )
        return MatchResult(
            device_prefix_len=match.length,
            last_device_node=match.node,
            last_host_node=match.node,
            best_match_node=match.node,
        )

    def touch_prefix(self, key: RadixKey) -> None:
        """Refresh the recency of a waiting request's prefix; never changes what is matched.

        SGLang passes no request here. The adapter is read off the end of ``extra_key``, which is
        ambiguous for a base request that sends an adapter id as its own extra key: that costs
        recency at worst, and nothing is ever served from this lookup.
        """
        extra_key = key.extra_key or ""
        named = (self.tree.adapter(extra_key[-size:]) for size in self._id_lengths if size <= len(extra_key))
        adapter = next((node for node in named if node is not None), self.tree.base)
        if adapter.resident:
            self.tree.match(adapter, key.token_ids, _namespace(key.extra_key, key.cache_salt), limit=len(key))

    def root_node_handle(self, extra_key: str | None = None) -> Node:
        """Handle of "no KV matched". SGLang asks right after a match, and means that match."""
        return self._matched_adapter

    @property
    def root_node(self) -> Node:
        return self.tree.root

    def checkpoint(self, req: Req, *, up_to: int, **_: Any) -> None:
        """Insert the request's KV up to ``up_to`` below its adapter and re-anchor its lock there.

        Frees the request's duplicates of what the tree already held, and repoints its row. A
        request whose adapter was unloaded meanwhile keeps its own slots; SGLang frees them with
        the row, and nothing of the old version can be matched again.
        """
        held: Node = req.lock.node
        if self.tree.is_doomed(held):
            return
        adapter = self.tree.adapter_of(held)
        kv = req.kv
        tokens: array[int] = req.full_untruncated_fill_ids[:up_to]
        # With mixed chunks `up_to` may run one past the known tokens: that token is still being computed.
        length = len(tokens) // self.page_size * self.page_size
        space = _namespace(req.extra_key, req.cache_salt)
        row = self.req_to_token_pool.req_to_token[kv.req_pool_idx, :length]
        own = row.to(torch.int64, copy=True)
        if self.auditor is not None:
            self.auditor.record(own[kv.cache_protected_len :], req.lora_id)
        inserted = self.tree.insert(adapter, tokens, space, own, length)
        kv.cache_inserted_len = max(kv.cache_inserted_len, length)
        prompt = min(len(req.origin_input_ids), length) // self.page_size * self.page_size
        if 0 < prompt < length:
            # Split at the prompt's end, so that eviction can drop the answer and keep the prompt.
            self.tree.split_at(adapter, tokens, space, prompt)
        start = kv.cache_protected_len
        if inserted.matched > start:
            self.token_to_kv_pool_allocator.free_segment(own[start : inserted.matched], start_pos=start)
            shared = self.path_device_indices(inserted.node)[start : inserted.matched]
            self.req_to_token_pool.write((kv.req_pool_idx, slice(start, inserted.matched)), shared)
        kv.cache_protected_len = length
        lock = self.lock(inserted.node)
        self.unlock(req.lock)
        req.lock = lock
        req.last_node = inserted.node

    def evict(self, params: EvictParams) -> EvictResult:
        """Free at least ``num_tokens`` slots if unlocked nodes allow it: KV leaves and idle adapters."""
        started = time.perf_counter()
        freed = self._release(self.tree.evict(params.num_tokens))
        self.update_eviction_metrics(freed, started)
        return EvictResult(num_tokens_evicted=freed)

    def inc_lock_ref(self, node: Node) -> IncLockRefResult:
        before = self.tree.evictable_size
        self.tree.lock(node)
        return IncLockRefResult(delta=self.tree.evictable_size - before)

    def dec_lock_ref(self, node: Node, params: DecLockRefParams | None = None) -> DecLockRefResult:
        before = self.tree.evictable_size
        self.tree.unlock(node)
        delta = self.tree.evictable_size - before
        self._release(self.tree.collect_doomed())
        return DecLockRefResult(delta=delta)

    def path_device_indices(self, node: Node) -> torch.Tensor:
        """KV slots from the adapter (exclusive) down to ``node``, int64, in token order."""
        payloads = [n.payload for n in self.tree.path(node)]
        return self._payloads.join(payloads) if payloads else self._no_slots

    def evictable_size(self) -> int:
        return self.tree.evictable_size

    def protected_size(self) -> int:
        return self.tree.protected_size

    def total_size(self) -> int:
        return self.tree.evictable_size + self.tree.protected_size

    def pretty_print(self) -> None:
        print(self.tree.render())


@dataclass
class CacheStats:
    """Counters since start, for ``/server_info`` and the tests; sizes in slots."""

    adapter_loads: int = 0
    adapter_slots_loaded: int = 0
    adapter_evictions: int = 0
    kv_evictions: int = 0
    kv_tokens_evicted: int = 0
