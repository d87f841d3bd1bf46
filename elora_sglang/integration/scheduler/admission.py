"""Admission: a request enters a batch only when its adapter's slots *and* its tokens fit together.

SGLang's ``PrefillAdder`` knows what the current pass has already promised, so the check lives there
(``managers/schedule_policy.py``), and adapters are made resident at that moment.

Order. SGLang scans the waiting queue and stops at the first request that does not fit. A request that lacks only
room for its adapter, or whose copy is far from done, is *passed over* instead, and those behind it may run as far as
``core/overtaking.py`` lets them: so far that nobody waits for an adapter more than twice as long, in batches, as
with nobody passing. None of them may bring in another adapter before a request that lacks room for its own. Room for
a request whose copy is under way is set aside, so whoever passes it costs it a prefill at most.
With policies other than ``--schedule-policy fcfs`` the rule bounds only what adapters do to their order.

What the host has starts moving when a request is queued, and admission does not wait for it: the forward does, layer
by layer. An adapter that only its file has is read here at the latest, which blocks, so one pass reads at most
``MAX_LOADS`` of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder

from elora_sglang.integration.cache.radix_cache import EloraRadixCache
from elora_sglang.runtime.adapters.files import AdapterError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

    from elora_sglang.core.tree.node import Node

#: Adapters that one prefill pass may load from their files.
MAX_LOADS = 2


class EloraPrefillAdder(PrefillAdder):
    """One prefill pass that reserves adapter slots and tokens together.

    ``blocked`` is the first request of this pass that found no room for its adapter.
    """

    tree_cache: EloraRadixCache

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.blocked: Req | None = None
        #: Whether this pass passed over a request whose copy is far from done.
        self.passed_over: bool = False
        self._loads = 0
        self._chunk = self.rem_chunk_tokens
        #: Whether a request was passed over, so that those behind it are overtakers.
        self._stopped = False
        #: Of those passed over: how many have their room set aside, so that only prefills can delay them, and
        #: how many have not.
        self._kept = self._short = 0
        #: Whether nobody else may be admitted in this pass.
        self._closed = False
        cache = self.tree_cache
        running = self.running_batch.reqs if self.running_batch is not None else []
        before = cache.begin_pass(self)
        # Those admitted by the pass before may not have been merged into the running batch yet.
        latest = before.can_run_list if before is not None else []
        cache.fairness.begin_pass({req.rid for reqs in (running, latest) for req in reqs})
        # Nothing ran since the last pass, because it passed over all it saw: waiting in the forward is better.
        self._patient = bool(running) or before is None or not before.passed_over or bool(latest)

    def budget_state(self) -> AddReqResult:
        """SGLang asks this before each request of the queue; ``OTHER`` ends the scan without marking the batch
        as full, so that the next iteration looks again.
        """
        return AddReqResult.OTHER if self._closed else super().budget_state()

    def may_consider(self, req: Req) -> bool:
        """Whether ``req`` may be looked at now: not if it may not pass those before it, nor before what it needs
        is near, nor its adapter before a blocked request's. Mutates what is noted about the pass and the queue.
        """
        cache = self.tree_cache
        if self._stopped and not cache.fairness.may_pass(req.rid, **self._batches(req)):
            return False
        node = cache.adapters.node(req.lora_id)
        far = self._patient and cache.tier is not None and not cache.manager.ready(req.rid)
        # In queue order, too, a third adapter to read waits for the next pass. A host copy takes nobody's time.
        if far or (self._loads >= MAX_LOADS and not node.resident and not node.clean):
            self.passed_over |= far
            self._pass_over(req, self._need(req, node), for_copy=True)
            return False
        if self.blocked is None or node.resident:
            return True
        cache.fairness.passed_over(req.rid)  # the room belongs to an earlier request
        return False

    def add_one_req(self, req: Req, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
        """Admit ``req`` or say why not; loads its adapter first when it fits. Mutates pool and tree."""
        fairness = self.tree_cache.fairness
        node = self.tree_cache.adapters.node(req.lora_id)
        admitted = len(self.can_run_list)
        batches = self._batches(req)
        verdict = None if node.resident else self._bring_in(req, node)
        if verdict is None:
            if not req.last_node.resident:
                # KV that had outlived its adapter (policy `static`) had to make room for the adapter itself.
                req.init_next_round_input(self.tree_cache)
            verdict = super().add_one_req(req, has_chunked_req, truncation_align_size)
        if len(self.can_run_list) > admitted:
            self.tree_cache.admitted(req)
            fairness.admit(req.rid, passing=self._stopped, **batches)
        elif (verdict is AddReqResult.NO_TOKEN or self.blocked is req) and self._nothing_will_end():
            give_up(req, "The request cannot fit: nothing runs, and its adapter and tokens exceed the pool.")
        elif verdict is AddReqResult.NO_TOKEN and not self._stopped:
            # Nobody passes it, but the slots of former overtakers may be what it lacks.
            waits = self._fcfs_waits(req, self._need(req, req.last_node) - req.prefix_len)
            fairness.stopped(req.rid, fcfs_waits=waits)
        if verdict is AddReqResult.NO_TOKEN and self.passed_over:
            # "Full" would keep the one whose copy arrives waiting until somebody ends.
            return AddReqResult.OTHER
        return verdict

    def preempt_to_schedule(self, req: Req) -> bool:
        """Stock's preemption, which frees rows and tokens, told that a cold adapter needs room as well."""
        node = self.tree_cache.adapters.node(req.lora_id)
        if node.resident:
            return bool(super().preempt_to_schedule(req))
        if self.blocked is not None:
            return False
        self.memory_budget.total_offset += node.size
        try:
            return bool(super().preempt_to_schedule(req))
        finally:
            self.memory_budget.total_offset -= node.size

    def _bring_in(self, req: Req, node: Node) -> AddReqResult | None:
        """Make the request's adapter resident; a verdict when the request cannot be admitted now."""
        if self.prefill_max_requests is not None and len(self.can_run_list) >= self.prefill_max_requests:
            return AddReqResult.OTHER
        at_hand = node.clean
        need = self._need(req, node)
        # The same strict comparison as PrefillBudget.check_prefill, which will see `node.size` less.
        if need < self.memory_budget.remaining_total:
            try:
                if self.tree_cache.adapters.load(node):
                    self._loads += not at_hand
                    return None
            except AdapterError as error:
                give_up(req, str(error), status=error.status_code)
                return AddReqResult.CONTINUE
        self.blocked = req
        self._pass_over(req, need, for_copy=False)
        return AddReqResult.CONTINUE

    def _pass_over(self, req: Req, need: int, *, for_copy: bool) -> None:
        """``req`` waits for its adapter's room or for a copy: who may be admitted before it?"""
        fairness = self.tree_cache.fairness
        fairness.passed_over(req.rid)
        if not self._stopped:
            waits = for_copy or self._fcfs_waits(req, need)
            fairness.stopped(req.rid, fcfs_waits=waits, for_copy=for_copy)
        self._stopped = True
        if for_copy and need < self.memory_budget.remaining_total:
            self.memory_budget.total_offset += need
            self._kept += 1
        else:
            self._short += 1
        # Ends the scan at once where not even the shortest request may pass: a thousand may wait.
        self._closed = not fairness.may_pass(None, chunks=1, tokens=0 if self._keeps_room() else 1)

    def _need(self, req: Req, node: Node) -> int:
        """Slots that ``req`` takes of the room: its tokens, none of them cached, and what is not locked from
        ``node`` up to its adapter, which counts as room so far.
        """
        need = _length(req) + min(_tokens_left(req), CLIP_MAX_NEW_TOKENS) + self.per_req_token_overhead
        while node.parent is not None:
            if not node.resident or node.evictable:
                need += node.size
            node = node.parent
        return need

    def _batches(self, req: Req) -> dict[str, int]:
        """Prefill and decode batches by which ``req`` could delay those that it passes."""
        chunks = 1
        if self._chunk is not None and self._chunk > 0:
            # The first chunk is what this pass has left of its own.
            chunks += -(-max(_length(req) - max(self.rem_chunk_tokens, 0), 0) // self._chunk)
        held = not self._keeps_room() and req.to_finish is None
        return {"chunks": chunks, "tokens": _tokens_left(req) if held else 0}

    def _keeps_room(self) -> bool:
        """Whether room, and a row, is set aside for all that were passed over."""
        if self.max_running_requests is None or self.running_batch is None:
            return self._short == 0
        rows = self.max_running_requests - len(self.running_batch.reqs) - len(self.can_run_list)
        return self._short == 0 and rows > self._kept

    def _fcfs_waits(self, req: Req, need: int) -> bool:
        """Whether ``req`` would not fit even if nobody had overtaken it."""
        return need >= self.memory_budget.remaining_total + self._held_by_overtakers(req)

    def _held_by_overtakers(self, req: Req) -> int:
        """Slots that end with the overtakers of ``req``: never too few; what others share is counted for them."""
        late = set(self.tree_cache.fairness.overtakers(req.rid))
        if not late:
            return 0
        reqs = [*(self.running_batch.reqs if self.running_batch is not None else ()), *self.can_run_list]
        kept = {other.lora_id for other in reqs if other.rid not in late}
        held, seen = 0, set()
        for other in reqs:
            if other.rid not in late:
                continue
            tokens = _length(other) - other.kv.cache_protected_len
            left = min(_tokens_left(other), CLIP_MAX_NEW_TOKENS)
            held += max(tokens, 0) + left + self.per_req_token_overhead
            node: Node | None = other.last_node
            while node is not None and node.kind != "root" and node.id not in seen:
                seen.add(node.id)
                if node.kind == "kv" or not (node.pinned or other.lora_id in kept):
                    held += node.size
                node = node.parent
        return held

    def _nothing_will_end(self) -> bool:
        """Whether no request holds anything that could be waited for: only pinned adapters are protected."""
        if self.can_run_list or (self.running_batch is not None and self.running_batch.reqs):
            return False
        if self.tree_cache.driver.busy:
            return False
        tree = self.tree_cache.tree
        pinned = sum(node.size for node in tree.adapters() if node.pinned and node.resident)
        return bool(tree.protected_size == pinned)


def _length(req: Req) -> int:
    """Tokens of ``req`` so far."""
    return len(req.origin_input_ids) + len(req.output_ids)


def _tokens_left(req: Req) -> int:
    """Tokens that ``req`` may still generate."""
    return max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)


def give_up(req: Req, message: str, status: int = 400) -> None:
    """Abort a request that waits: SGLang runs it as a one-token prompt, which needs no adapter."""
    req.lora_id = None
    req.extra_key = None
    req.set_finish_with_abort(message, status_code=status)


def prefill_adder_class(
    original: Callable[[Scheduler], type[PrefillAdder]], scheduler: Scheduler
) -> type[PrefillAdder]:
    """AROUND ``Scheduler.get_prefill_adder_class``: ours, unless somebody else replaced the stock one."""
    stock = original(scheduler)
    if stock is not PrefillAdder:
        raise RuntimeError(
            f"elora: PrefillAdder was replaced by {stock.__module__}.{stock.__qualname__}; "
            "remove that plugin, --elora needs the stock class"
        )
    return EloraPrefillAdder


def can_schedule_lora_req(
    original: Callable[..., bool], scheduler: Scheduler, req: Req, running_loras: set[str | None]
) -> bool:
    """AROUND ``Scheduler.can_schedule_lora_req``: slot counting is gone, only room in the pool counts.

    Runs before the request is matched, so it also keeps requests that could not be admitted in this
    pass anyway from costing a tree walk each.
    """
    cache: EloraRadixCache = scheduler.tree_cache
    if req.lora_id is not None:
        if req.to_finish is not None:
            # Already aborted: an adapter larger than the pool would otherwise block the queue for ever.
            req.lora_id = None
            req.extra_key = None
        elif not cache.weights.is_loaded(req.lora_id):
            give_up(req, f"The adapter with id {req.lora_id!r} is not loaded.", status=404)
    if scheduler.lora_drainer and not scheduler.lora_drainer.can_schedule(req):
        return False
    assert cache.current_adder is not None  # set when this pass's adder was built
    return cache.current_adder.may_consider(req)


def init_req_max_new_tokens(original: Callable[..., None], scheduler: Scheduler, req: Req) -> None:
    """AROUND ``Scheduler.init_req_max_new_tokens``: the pool also has to hold adapters.

    Caps ``max_new_tokens`` by what is left beside the request's adapter and all pinned ones, used or not,
    and aborts the request (HTTP 400) when not even its prompt fits: it could never be admitted.
    """
    original(scheduler, req)
    weights = scheduler.tree_cache.weights
    if req.to_finish is not None:
        return
    if req.lora_id is not None and not weights.is_loaded(req.lora_id):
        give_up(req, f"The adapter with id {req.lora_id!r} is not loaded.", status=404)
        return
    own = 0 if req.lora_id is None else weights.slots_needed(req.lora_id)
    reserved = own + weights.pinned_slots(excluding=req.lora_id)
    if not reserved:
        return
    page = scheduler.page_size
    prompt = -(-len(req.origin_input_ids) // page) * page
    room = scheduler.max_total_num_tokens - reserved - prompt - page - 1
    if room < 0:
        give_up(
            req,
            f"The request cannot fit: its adapter and the pinned ones take {reserved} slots and its prompt "
            f"{prompt}, the pool has {scheduler.max_total_num_tokens}. Raise --mem-fraction-static or "
            "--max-total-tokens, unpin adapters, or send a shorter prompt.",
        )
        room = 0
    params = req.sampling_params
    params.max_new_tokens = min(params.max_new_tokens, room)
    params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)
