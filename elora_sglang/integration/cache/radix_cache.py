"""SGLang's prefix cache, backed by the dependency tree of :mod:`elora_sglang.core`.

The manager decides, the driver executes: this class turns SGLang's calls into the manager's events and the manager's
answers into SGLang's. What it works with is built in ``wiring.py``.
Every KV node hangs below the node of its adapter, and a miss returns that adapter node, so
SGLang's own ``lock(req.last_node)`` pins root, adapter and KV in one go.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    BasePrefixCache,
    CacheRequestHandle,
    DecLockRefParams,
    DecLockRefResult,
    EvictParams,
    EvictResult,
    IncLockRefResult,
    InitLoadBackParams,
    MatchPrefixParams,
    MatchResult,
)

from elora_sglang.core.manager import Action, CacheManager, Load
from elora_sglang.core.overtaking import Overtaking
from elora_sglang.core.tree.node import Node
from elora_sglang.integration.cache import session_hints
from elora_sglang.runtime.audit.device import Auditor
from elora_sglang.runtime.cost_meter import CostMeter
from elora_sglang.runtime.fences import BatchFences
from elora_sglang.runtime.host_tier import HostTier
from elora_sglang.runtime.lora_pool import LoRAPool
from elora_sglang.runtime.pool.slots import SlotPayloads
from elora_sglang.runtime.swap_driver import SwapDriver
from elora_sglang.runtime.ticks import TickSource
from elora_sglang.runtime.trace_file import TraceFile
from elora_sglang.runtime.tree_adapters import TreeAdapters

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

#: Decode steps of every running request that the swapper's copies leave room for.
STEPS_AHEAD = 16


class PrefillPass(Protocol):
    """What the cache keeps of a prefill pass, for the pass after it and for SGLang's hooks."""

    #: Requests that the pass admitted, in order.
    can_run_list: list[Req]
    #: Whether it passed over a request whose copy is far from done.
    passed_over: bool

    def may_consider(self, req: Req) -> bool:
        """Whether ``req`` may be looked at now."""


@dataclass(frozen=True)
class CacheParts:
    """What one prefix cache works with; :func:`elora_sglang.integration.cache.wiring.build` makes it.

    Attributes:
        manager: decides.
        weights: the LoRA pool, whose adapters live in slots of the cache's allocator.
        tier: the host tier; ``None`` without one.
        driver: carries out what was decided.
        adapters: adapters as nodes of the tree.
        fences: which copies a batch has to wait for.
        ticks: time and ended copies, the same on every rank.
        meter: refines costs; rank 0 only.
        auditor: ``None`` unless it was asked for.
        trace: where events are recorded; ``None`` unless it was asked for.
        follower: whether this is a tensor-parallel rank after the first.
    """

    manager: CacheManager
    weights: LoRAPool
    tier: HostTier | None
    driver: SwapDriver
    adapters: TreeAdapters
    fences: BatchFences
    ticks: TickSource
    meter: CostMeter | None
    auditor: Auditor | None
    trace: TraceFile | None
    follower: bool


def _namespace(extra_key: str | None, cache_salt: str | None) -> Hashable:
    """Cache namespace below an adapter. SGLang puts the adapter id at the end of ``extra_key``;
    it is harmless here, because the adapter itself comes from the request, never from this string."""
    return None if extra_key is None and not cache_salt else (extra_key, cache_salt or None)


class EloraRadixCache(BasePrefixCache):
    """Prefix cache over one dependency tree that holds adapters *and* KV in the same slot pool.

    Args:
        params: SGLang's construction arguments (pools, page size, metrics switch).
        parts: what it works with.

    Attributes:
        stats: what was done since start; the driver's, to which the cache adds tokens by where they came from.
        fairness: who may be admitted before whom while requests wait for adapters.
        current_adder: the prefill pass in progress.
    """

    disable = False

    def __init__(self, params: CacheInitParams, parts: CacheParts) -> None:
        self.req_to_token_pool = params.req_to_token_pool
        self.token_to_kv_pool_allocator = params.token_to_kv_pool_allocator
        self.page_size = params.page_size
        self.is_eagle = params.is_eagle
        self.device = self.token_to_kv_pool_allocator.device
        self.manager, self.tree = parts.manager, parts.manager.tree
        self.weights, self.tier = parts.weights, parts.tier
        self.driver, self.stats = parts.driver, parts.driver.stats
        self.adapters, self.fences = parts.adapters, parts.fences
        self.ticks, self.meter = parts.ticks, parts.meter
        self.auditor, self.trace = parts.auditor, parts.trace
        self.fairness = Overtaking()
        self.current_adder: PrefillPass | None = None
        self._follower = parts.follower
        self._payloads = SlotPayloads()
        self._no_slots = torch.empty((0,), dtype=torch.int64, device=self.device)
        self._matched_adapter: Node = self.tree.base
        #: Tokens that were copied from the host for a request before it was admitted.
        self._fetched: dict[str, int] = {}
        if params.enable_metrics:
            self.init_metrics_collector()

    # -- the life of a request ------------------------------------------------------------------

    def tick(self, running: int, waiting: bool, promised: int = 0) -> None:
        """Once per scheduler iteration: what finished is booked, what the swapper decides is started.

        Args:
            running: requests that run.
            waiting: whether any wait.
            promised: slots that the rest of a chunked prompt needs: SGLang checks for room once, before its
                first chunk, and takes it later unasked.
        """
        self.driver.reserve = promised + running * (self.page_size + STEPS_AHEAD)
        for tick in self.ticks.due():
            self.adapters.place_new()
            self.driver.book_ended(tick.finished, follower=self._follower)
            actions = self.manager.tick(
                tick.now,
                self.token_to_kv_pool_allocator.available_size(),
                finished=list(tick.finished),
                costs=tick.costs,
                running=running,
            )
            self._note_prefetches(actions)
            self.driver.execute(actions)
            if tick.finished:  # a copy may have been the last to hold an unloaded branch
                self.driver.execute(self.manager.collect())
            if self.trace is not None:
                self.trace.tick(tick.now)
        self.driver.reserve = 0
        self.ticks.busy = self.driver.busy or bool(running) or waiting

    def _note_prefetches(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Load) and action.rid is not None:
                tokens = sum(item.size for item in action.items if item.kind == "kv")
                self._fetched[action.rid] = self._fetched.get(action.rid, 0) + tokens

    def enqueued(self, req: Req) -> None:
        """The request waits from now on; what it needs may start moving at the next tick."""
        lost = req.lora_id is not None and not self.weights.is_loaded(req.lora_id)
        if lost or req.to_finish is not None:
            self.fairness.queue(req.rid, for_adapter=False)
            return
        adapter = self.adapters.node(req.lora_id)
        self.fairness.queue(req.rid, for_adapter=not adapter.resident)
        req.refresh_fill_ids()
        ids = req.full_untruncated_fill_ids
        if req.positional_embed_overrides is not None:
            ids = array("q")  # such a request shares no KV (Req.init_next_round_input)
        tokens = ids[: max(len(ids) - 1, 0)]
        space = _namespace(req.extra_key, req.cache_salt)
        self._fetched.pop(req.rid, None)
        self.manager.enqueue(req.rid, adapter.key, tokens, space, hints=session_hints.of(req))

    def admitted(self, req: Req) -> None:
        """The request runs: its use counts, its guards go, its forward waits for what it still needs."""
        node: Node = req.last_node
        self.manager.started(req.rid, node)
        fetched = min(self._fetched.pop(req.rid, 0), max(req.prefix_len - req.host_loaded_length, 0))
        if fetched:
            # As SGLang reports host hits: tokens of the prefix that a copy from the host brought.
            req.host_hit_length += fetched
            req.host_loaded_length += fetched
        if not req.retracted_stain:
            self.stats.tokens_host += req.host_loaded_length
            self.stats.tokens_device += req.prefix_len - req.host_loaded_length
            self.stats.tokens_computed += len(req.full_untruncated_fill_ids) - req.prefix_len
        self.fences.use(node)

    def begin_pass(self, adder: PrefillPass) -> PrefillPass | None:
        """A prefill pass begins; returns the pass before it."""
        before, self.current_adder = self.current_adder, adder
        self.fences.begin()
        return before

    def release_aborted_request(self, handle: CacheRequestHandle) -> None:
        """A waiting request was aborted: nothing is fetched or kept for it any more."""
        self._fetched.pop(handle.rid, None)
        self.fairness.leave(handle.rid)
        self.manager.forget(handle.rid)

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        """A request gave its row back; one that finished tells the policy whether to expect its return."""
        node: Node | None = req.last_node
        if req.finished() and node is not None and node.parent is not None:
            self.manager.finished(req.rid, node, session_hints.of(req))

    # -- SGLang's contract ----------------------------------------------------------------------

    def reset(self) -> None:
        """Forget everything on both tiers, after all copies ended. SGLang clears the allocator right afterwards."""
        self.driver.drain()
        self._fetched.clear()
        self.adapters.forget()
        self.manager.reset()
        self._matched_adapter = self.tree.base

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Longest prefix of the request below its adapter that either tier has; may split a node.

        What is on its way to the device counts as there: the forward waits for it.
        """
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
        adapter = self.adapters.node(lora_id)
        self._matched_adapter = adapter
        params.req.host_loaded_length = 0
        match = self.manager.match(
            adapter, key.token_ids, _namespace(key.extra_key, key.cache_salt), limit=len(key)
        )
        return MatchResult(
            device_prefix_len=match.length,
            last_device_node=match.node,
            last_host_node=match.host_node,
            best_match_node=match.host_node,
            host_hit_length=match.host_length,
        )

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, Node] | None:
        """Start the copy of a request's host-only prefix: all that the match promised, or none of it."""
        node: Node = params.best_match_node
        assert params.req is not None
        load = self.manager.load_for(node) if node.parent is not None and not node.resident else None
        if load is None or not self.driver.load(load):
            return 0, params.req.last_node
        return params.host_hit_length, node

    def touch_prefix(self, key: RadixKey) -> None:
        """Refresh the recency of a waiting request's prefix; never changes what is matched.

        SGLang passes no request here. The adapter is read off ``extra_key``; where that is ambiguous it
        costs recency at worst, and nothing is ever served from this lookup.
        """
        adapter = self.adapters.named_at_end(key.extra_key or "")
        if adapter.resident:
            self.manager.match(
                adapter, key.token_ids, _namespace(key.extra_key, key.cache_salt), limit=len(key)
            )

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
        inserted = self.manager.insert(adapter, tokens, space, own, length)
        kv.cache_inserted_len = max(kv.cache_inserted_len, length)
        prompt = min(len(req.origin_input_ids), length) // self.page_size * self.page_size
        if 0 < prompt < length:
            # Split at the prompt's end, so that eviction can drop the answer and keep the prompt.
            self.manager.split_at(adapter, tokens, space, prompt)
        start = kv.cache_protected_len
        if inserted.matched > start:
            self.token_to_kv_pool_allocator.free_segment(own[start : inserted.matched], start_pos=start)
            shared = self.path_device_indices(inserted.node)[start : inserted.matched]
            self.req_to_token_pool.write((kv.req_pool_idx, slice(start, inserted.matched)), shared)
            # What the tree has may be on its way, for another request; this one reads it in its next batch.
            self.fences.repoint(inserted.node)
        kv.cache_protected_len = length
        lock = self.lock(inserted.node)
        self.unlock(req.lock)
        req.lock = lock
        req.last_node = inserted.node

    def evict(self, params: EvictParams) -> EvictResult:
        """Free at least ``num_tokens`` slots if unlocked nodes allow it: KV leaves and idle adapters."""
        started = time.perf_counter()
        freed = self.driver.execute(self.manager.evict(params.num_tokens))
        self.update_eviction_metrics(freed, started)
        return EvictResult(num_tokens_evicted=freed)

    def inc_lock_ref(self, node: Node) -> IncLockRefResult:
        before = self.tree.evictable_size
        self.manager.lock(node)
        return IncLockRefResult(delta=self.tree.evictable_size - before)

    def dec_lock_ref(self, node: Node, params: DecLockRefParams | None = None) -> DecLockRefResult:
        before = self.tree.evictable_size
        self.manager.unlock(node)
        delta = self.tree.evictable_size - before
        self.driver.execute(self.manager.collect())
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
