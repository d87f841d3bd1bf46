"""Admission in SGLang's prefill pass: ``core/admission.py`` decides, this file tells it what is there and obeys.

SGLang scans its waiting queue and asks, for each request: may the scan go on (:meth:`EloraPrefillAdder.budget_state`),
may this request be looked at (:func:`may_schedule`), and does it fit
(:meth:`EloraPrefillAdder.add_one_req`; ``managers/schedule_policy.py``). ``PrefillAdder`` knows what the current pass
has promised already, so the questions to the core are asked from here, and adapters are brought in at that moment.

What the host has starts moving when a request is queued, and admission does not wait for it: the forward does, layer
by layer. An adapter that only its file has is read here at the latest, which blocks.
With policies other than ``--schedule-policy fcfs`` the rule bounds only what adapters do to their order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder

from elora_sglang.core.admission import Ask, Entry, Holding
from elora_sglang.integration.cache.radix_cache import EloraRadixCache
from elora_sglang.runtime.adapters.files import AdapterError

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

    from elora_sglang.core.tree.node import Node


class EloraPrefillAdder(PrefillAdder):
    """One prefill pass that reserves adapter slots and tokens together."""

    tree_cache: EloraRadixCache

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cache = self.tree_cache
        self._manager = cache.manager
        #: Whether nobody else may be admitted in this pass.
        self._closed = False
        before = cache.begin_pass(self)
        # Those admitted by the pass before may not have been merged into the running batch yet.
        latest = before.can_run_list if before is not None else []
        running = dict.fromkeys(req.rid for reqs in (self._running(), latest) for req in reqs)
        self._manager.begin_pass(list(running), self.rem_chunk_tokens)

    def budget_state(self) -> AddReqResult:
        """SGLang asks this before each request of the queue; ``OTHER`` ends the scan without marking the batch
        as full, so that the next iteration looks again.
        """
        return AddReqResult.OTHER if self._closed else super().budget_state()

    def may_consider(self, req: Req) -> bool:
        """Whether ``req`` may be looked at now. Mutates what is noted about the pass and the queue."""
        self.tree_cache.adapters.node(req.lora_id)  # registered on first use
        return self._obey(self._manager.consider(self._ask(req), self._holdings(req)))

    def add_one_req(self, req: Req, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
        """Admit ``req`` or say why not; brings in its adapter first when it fits. Mutates pool and tree."""
        node = self.tree_cache.adapters.node(req.lora_id)
        admitted = len(self.can_run_list)
        verdict = None if node.resident else self._bring_in(req, node)
        if verdict is not None:
            return verdict
        if not req.last_node.resident:
            # KV that had outlived its adapter (policy `static`) had to make room for the adapter itself.
            req.init_next_round_input(self.tree_cache)
        verdict = super().add_one_req(req, has_chunked_req, truncation_align_size)
        if len(self.can_run_list) > admitted:
            self.tree_cache.admitted(req)
        elif verdict is AddReqResult.NO_TOKEN:
            entry = self._manager.no_tokens(
                self._ask(req), req.last_node, req.prefix_len, self._holdings(req)
            )
            if entry.hopeless:
                give_up(
                    req, "The request cannot fit: nothing runs, and its adapter and tokens exceed the pool."
                )
        if verdict is AddReqResult.NO_TOKEN and self._manager.admission.looked_past:
            # "Full" would keep the one whose copy arrives waiting until somebody ends.
            return AddReqResult.OTHER
        return verdict

    def preempt_to_schedule(self, req: Req) -> bool:
        """Stock's preemption, which frees rows and tokens, told that a cold adapter needs room as well."""
        node = self.tree_cache.adapters.node(req.lora_id)
        if node.resident:
            return bool(super().preempt_to_schedule(req))
        if self._manager.admission.blocked is not None:
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
        manager, read = self._manager, not node.clean
        # Compared as strictly as PrefillBudget.check_prefill will, which then sees `node.size` less.
        entry = manager.bring_in(self._ask(req), self._holdings(req))
        if entry.may:
            try:
                if self.tree_cache.executor.bring_in(node):
                    manager.brought_in(read)
                    return None
            except AdapterError as error:
                give_up(req, str(error), status=error.status_code)
                return AddReqResult.CONTINUE
            entry = manager.no_room(self._ask(req), self._holdings(req))
        self._obey(entry)
        if entry.hopeless:
            give_up(req, "The request cannot fit: nothing runs, and its adapter and tokens exceed the pool.")
        return AddReqResult.CONTINUE

    def _obey(self, entry: Entry) -> bool:
        self.memory_budget.total_offset += entry.set_aside
        self._closed |= entry.closed
        return entry.may

    # -- what is there ----------------------------------------------------------------------------

    def _running(self) -> list[Req]:
        return self.running_batch.reqs if self.running_batch is not None else []

    def _ask(self, req: Req) -> Ask:
        """What ``req`` would take and what this pass has left, in tokens, which are slots here."""
        running, left = len(self._running()), _tokens_left(req)
        rows = None
        if self.max_running_requests is not None and self.running_batch is not None:
            rows = self.max_running_requests - running - len(self.can_run_list)
        return Ask(
            rid=req.rid,
            adapter=req.lora_id,
            need=_length(req) + min(left, CLIP_MAX_NEW_TOKENS) + self.per_req_token_overhead,
            room=int(self.memory_budget.remaining_total),
            length=_length(req),
            left=left if req.to_finish is None else 0,
            chunk_left=self.rem_chunk_tokens,
            rows=rows,
            alone=not running and not self.can_run_list,
        )

    def _holdings(self, req: Req) -> list[Holding]:
        """What everybody who runs will give back; empty where no answer about ``req`` depends on it."""
        if not self._manager.admission.wants_holdings(req.rid):
            return []
        found = []
        for other in (*self._running(), *self.can_run_list):
            own = max(_length(other) - other.kv.cache_protected_len, 0)
            left = min(_tokens_left(other), CLIP_MAX_NEW_TOKENS)
            found.append(
                Holding(other.rid, other.lora_id, own + left + self.per_req_token_overhead, other.last_node)
            )
        return found


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


def adder_class(stock: type[PrefillAdder]) -> type[PrefillAdder]:
    """The class of a prefill pass. Raises RuntimeError if ``stock`` is not SGLang's own: another plugin replaced it."""
    if stock is not PrefillAdder:
        raise RuntimeError(
            f"elora: PrefillAdder was replaced by {stock.__module__}.{stock.__qualname__}; "
            "remove that plugin, --elora needs the stock class"
        )
    return EloraPrefillAdder


def may_schedule(scheduler: Scheduler, req: Req) -> bool:
    """Whether ``req`` may be looked at in this pass. Mutates a request that was aborted, or whose adapter is gone.

    SGLang asks before it matches the request, so who could not be admitted anyway costs no tree walk.
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


def limit_new_tokens(scheduler: Scheduler, req: Req) -> None:
    """Cap ``max_new_tokens`` by what is left beside the request's adapter and all pinned ones, used or not.

    Aborts the request (HTTP 400) when not even its prompt fits: it could never be admitted.
    """
    weights = scheduler.tree_cache.weights
    if req.to_finish is not None:
        return
    if req.lora_id is not None and not weights.is_loaded(req.lora_id):
        give_up(req, f"The adapter with id {req.lora_id!r} is not loaded.", status=404)
        return
    own = 0 if req.lora_id is None else weights.slots_needed(req.lora_id)
    pinned = weights.pinned_slots(excluding=req.lora_id)
    if not own + pinned:
        return
    room = scheduler.tree_cache.manager.most_new_tokens(len(req.origin_input_ids), own, pinned)
    if room < 0:
        give_up(
            req,
            f"The request cannot fit: its adapter and the pinned ones take {own + pinned} slots and its prompt "
            f"{len(req.origin_input_ids)}, the pool has {scheduler.max_total_num_tokens}. Raise "
            "--mem-fraction-static or --max-total-tokens, unpin adapters, or send a shorter prompt.",
        )
        room = 0
    params = req.sampling_params
    params.max_new_tokens = min(params.max_new_tokens, room)
    params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)
