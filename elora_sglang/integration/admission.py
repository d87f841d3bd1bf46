"""Admission: a request enters a batch only when its adapter's slots *and* its tokens fit together.

SGLang's ``PrefillAdder`` knows what the current pass has already promised, so the check lives there
(``managers/schedule_policy.py``), and adapters are made resident at that moment.

Order. SGLang scans the waiting queue first come, first served, and stops at the first request that
does not fit. A request that lacks only room for its adapter is *passed over* instead: base-model
requests and requests of resident adapters behind it may run, but none may bring in another adapter
before it. After ``MAX_OVERTAKES`` admissions past it the scan stops at it, everything that ends makes
room for it, and it runs next: no request waits for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS, AddReqResult, PrefillAdder

from elora_sglang.integration.radix_cache import EloraRadixCache

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

#: Admissions that may overtake one request that waits for room for its adapter.
MAX_OVERTAKES = 64

#: Attribute on a request: how many admissions have overtaken it so far.
_OVERTAKEN = "_elora_overtaken"


class EloraPrefillAdder(PrefillAdder):
    """One prefill pass that reserves adapter slots and tokens together.

    ``blocked`` is the first request of this pass that found no room for its adapter.
    """

    tree_cache: EloraRadixCache

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.blocked: Req | None = None
        self.tree_cache.current_adder = self

    def may_consider(self, lora_id: str | None) -> bool:
        """Whether a request of this adapter may be looked at behind a blocked one. Mutates nothing."""
        return self.blocked is None or self.tree_cache.adapter_node(lora_id).resident

    def add_one_req(self, req: Req, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
        """Admit ``req`` or say why not; loads its adapter first when it fits. Mutates pool and tree."""
        node = self.tree_cache.adapter_node(req.lora_id)
        if not node.resident and (verdict := self._bring_in(req)) is not None:
            return verdict
        admitted = len(self.can_run_list)
        verdict = super().add_one_req(req, has_chunked_req, truncation_align_size)
        if self.blocked is not None and len(self.can_run_list) > admitted:
            setattr(self.blocked, _OVERTAKEN, getattr(self.blocked, _OVERTAKEN, 0) + 1)
        return verdict

    def _bring_in(self, req: Req) -> AddReqResult | None:
        """Make the request's adapter resident; a verdict when the request cannot be admitted now."""
        if self.prefill_max_requests is not None and len(self.can_run_list) >= self.prefill_max_requests:
            return AddReqResult.OTHER
        if self.blocked is not None:
            return AddReqResult.CONTINUE  # it would take the room that an earlier request waits for
        node = self.tree_cache.adapter_node(req.lora_id)
        tokens = (
            len(req.full_untruncated_fill_ids)
            - req.prefix_len
            + min(
                max(req.sampling_params.max_new_tokens - len(req.output_ids), 0),
                CLIP_MAX_NEW_TOKENS,
            )
            + self.per_req_token_overhead
        )
        # The same strict comparison as PrefillBudget.check_prefill, which will see `node.size` less.
        if node.size + tokens < self.memory_budget.remaining_total and self.tree_cache.load_adapter(node):
            return None
        if getattr(req, _OVERTAKEN, 0) >= MAX_OVERTAKES:
            return AddReqResult.NO_TOKEN
        self.blocked = req
        return AddReqResult.CONTINUE


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
    if req.to_finish is not None and req.lora_id is not None:
        # Already aborted: SGLang still runs it as a one-token prompt. It needs no adapter for that,
        # and an adapter larger than the pool would otherwise block the queue for ever.
        req.lora_id = None
        req.extra_key = None
    if scheduler.lora_drainer and not scheduler.lora_drainer.can_schedule(req):
        return False
    return scheduler.tree_cache.current_adder.may_consider(req.lora_id)


def init_req_max_new_tokens(original: Callable[..., None], scheduler: Scheduler, req: Req) -> None:
    """AROUND ``Scheduler.init_req_max_new_tokens``: the pool also has to hold the request's adapter.

    Caps ``max_new_tokens`` by what is left beside the adapter and all pinned ones, and aborts the
    request (HTTP 400) when not even its prompt fits: it could never be admitted.
    """
    original(scheduler, req)
    if req.lora_id is None or req.to_finish is not None:
        return
    cache: EloraRadixCache = scheduler.tree_cache
    node = cache.adapter_node(req.lora_id)
    reserved = cache.tree.pinned_size(excluding=node) + node.size
    page = scheduler.page_size
    prompt = -(-len(req.origin_input_ids) // page) * page
    room = scheduler.max_total_num_tokens - reserved - prompt - page - 1
    params = req.sampling_params
    if room < 0:
        total = scheduler.max_total_num_tokens
        req.lora_id = None
        req.extra_key = None
        req.set_finish_with_abort(
            f"The request cannot fit: its adapter and the pinned ones take {reserved} slots and its prompt "
            f"{prompt}, the pool has {total}. Raise --mem-fraction-static or --max-total-tokens, "
            "unpin adapters, or send a shorter prompt."
        )
        room = 0
    params.max_new_tokens = min(params.max_new_tokens, room)
    params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)
