"""Admission: a request enters a batch only when its adapter's slots *and* its tokens fit together.

SGLang's ``PrefillAdder`` knows what the current pass has already promised, so the check lives there
(``managers/schedule_policy.py``), and adapters are made resident at that moment.

Order. SGLang scans the waiting queue and stops at the first request that does not fit. A request that lacks
only room for its adapter is *passed over* instead: base-model requests and requests of resident adapters
behind it may run, but none may bring in another adapter before it. After ``MAX_OVERTAKES`` admissions past it,
what it needs is set aside from the pass's budget: whoever is behind runs in what is left beyond that, and
everything that ends makes room for it. In queue order (``--schedule-policy fcfs``, SGLang's default) no request
waits for ever; policies that reorder the queue by cached prefix may starve cold prompts, as stock does.

What the host has starts moving when a request is queued, and admission does not wait for it: the forward does, layer
by layer. A request whose copy is far from done is passed over while others can run. An adapter that only its file has
is read here at the latest, which blocks, so one pass reads at most ``MAX_LOADS`` of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder

from elora_sglang.integration.adapter_files import AdapterError
from elora_sglang.integration.radix_cache import EloraRadixCache

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

    from elora_sglang.core.node import Node

#: Admissions that may overtake one request that waits for room for its adapter.
MAX_OVERTAKES = 64

#: Adapters that one prefill pass may load from their files.
MAX_LOADS = 2

#: Attribute on a request: how many admissions have overtaken it since it last ran.
_OVERTAKEN = "_elora_overtaken"


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
        cache = self.tree_cache
        runs = self.running_batch is not None and bool(self.running_batch.reqs)
        before = cache.begin_pass(self)
        # Nothing ran since the last pass, because it passed over all it saw: waiting in the forward is better.
        self._patient = runs or before is None or not before.passed_over or bool(before.can_run_list)

    def may_consider(self, req: Req) -> bool:
        """Whether ``req`` may be looked at now: not before what it needs is near, nor its adapter before a
        blocked request's. Mutates only ``passed_over``.
        """
        cache = self.tree_cache
        if self._patient and cache.tier is not None and not cache.manager.ready(req.rid):
            self.passed_over = True
            return False
        return self.blocked is None or cache.adapter_node(req.lora_id).resident

    def add_one_req(self, req: Req, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
        """Admit ``req`` or say why not; loads its adapter first when it fits. Mutates pool and tree."""
        node = self.tree_cache.adapter_node(req.lora_id)
        admitted = len(self.can_run_list)
        verdict = None if node.resident else self._bring_in(req, node)
        if verdict is None:
            verdict = super().add_one_req(req, has_chunked_req, truncation_align_size)
        if len(self.can_run_list) > admitted:
            self.tree_cache.admitted(req)
            setattr(req, _OVERTAKEN, 0)
            if self.blocked is not None:
                setattr(self.blocked, _OVERTAKEN, getattr(self.blocked, _OVERTAKEN, 0) + 1)
        elif (verdict is AddReqResult.NO_TOKEN or self.blocked is req) and self._nothing_will_end():
            give_up(req, "The request cannot fit: nothing runs, and its adapter and tokens exceed the pool.")
        return verdict

    def preempt_to_schedule(self, req: Req) -> bool:
        """Stock's preemption, which frees rows and tokens, told that a cold adapter needs room as well."""
        node = self.tree_cache.adapter_node(req.lora_id)
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
        at_hand = node.clean  # a copy from the host blocks nobody
        if self.blocked is not None or (self._loads >= MAX_LOADS and not at_hand):
            return AddReqResult.CONTINUE  # the room or the time belongs to an earlier request
        new_tokens = max(req.sampling_params.max_new_tokens - len(req.output_ids), 0)
        need = (
            node.size
            + len(req.full_untruncated_fill_ids)
            - req.prefix_len
            + min(new_tokens, CLIP_MAX_NEW_TOKENS)
            + self.per_req_token_overhead
        )
        # The same strict comparison as PrefillBudget.check_prefill, which will see `node.size` less.
        if need < self.memory_budget.remaining_total:
            try:
                if self.tree_cache.load_adapter(node):
                    self._loads += not at_hand
                    return None
            except AdapterError as error:
                give_up(req, str(error), status=error.status_code)
                return AddReqResult.CONTINUE
        self.blocked = req
        if getattr(req, _OVERTAKEN, 0) >= MAX_OVERTAKES:
            self.memory_budget.total_offset += need
        return AddReqResult.CONTINUE

    def _nothing_will_end(self) -> bool:
        """Whether no request holds anything that could be waited for: only pinned adapters are protected."""
        if self.can_run_list or (self.running_batch is not None and self.running_batch.reqs):
            return False
        if self.tree_cache.driver.busy:
            return False
        tree = self.tree_cache.tree
        pinned = sum(node.size for node in tree.adapters() if node.pinned and node.resident)
        return bool(tree.protected_size == pinned)


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
