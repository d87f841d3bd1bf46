"""The scheduler process with ``--elora``: SGLang's ``Scheduler`` (``managers/scheduler.py``) with a tree that swaps.

SGLang builds it in every scheduler process, because ``patches/scheduler.py`` puts it in the place of the stock class.
It is the same in both event loops, and the same on every tensor-parallel rank.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.utils.msgspec_utils import msgspec_to_builtins

from elora_sglang.integration.adapters import scheduler_side
from elora_sglang.integration.cache import state as cache_state
from elora_sglang.integration.cache.radix_cache import EloraRadixCache
from elora_sglang.integration.plugin import counter
from elora_sglang.integration.plugin.verify import MARK, Refused
from elora_sglang.integration.scheduler import admission
from elora_sglang.integration.scheduler.receiver import TickReceiver

if TYPE_CHECKING:
    from sglang.srt.managers.io_struct import (
        GetInternalStateReq,
        GetInternalStateReqOutput,
        LoadLoRAAdapterFromTensorsReqInput,
        LoadLoRAAdapterReqInput,
        LoRAUpdateOutput,
        UnloadLoRAAdapterReqInput,
    )
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.schedule_policy import PrefillAdder


#: Further classes of ours that SGLang calls in a scheduler process, by the name under which calls are counted.
WATCHED: dict[str, type] = {
    "radix_cache": EloraRadixCache,
    "prefill_adder": admission.EloraPrefillAdder,
    "request_receiver": TickReceiver,
}


class EloraScheduler(Scheduler):
    """Admits a request when its adapter and its tokens fit together, and lets the swapper decide once per iteration."""

    tree_cache: EloraRadixCache

    # -- start ----------------------------------------------------------------------------------------------

    def init_model_worker(self) -> None:
        """Marks the worker as this class's, so that the prefix cache can refuse any other scheduler."""
        super().init_model_worker()
        setattr(self.tp_worker, MARK, type(self))

    def init_lora_overlap_loader(self) -> None:
        """Also checks the adapters of ``--lora-paths`` against the pool, whose size is known here.

        Raises:
            Refused: the pool cannot hold one of them, or the prefix cache is not ELORA's.
        """
        super().init_lora_overlap_loader()
        if not isinstance(self.tree_cache, EloraRadixCache):
            raise Refused(f"the prefix cache is {type(self.tree_cache).__qualname__}, not EloraRadixCache")
        scheduler_side.check_start_adapters(self)

    def init_request_receiver(self) -> None:
        """The receiver also carries rank 0's tick to all ranks."""
        super().init_request_receiver()
        self.request_receiver: Any = TickReceiver.over(self.request_receiver, self.tree_cache.ticks)
        for name, ours in WATCHED.items():
            counter.watch(name, ours)

    # -- admission ------------------------------------------------------------------------------------------

    def get_prefill_adder_class(self) -> type[PrefillAdder]:
        """Admission that reserves a request's adapter slots and tokens together. Raises RuntimeError if another
        plugin has replaced the stock class."""
        return admission.adder_class(super().get_prefill_adder_class())

    def can_schedule_lora_req(self, req: Req, running_loras: set[str | None]) -> bool:
        """Only room in the pool counts: the stock method, which counts LoRA slots, is not asked. Mutates ``req``."""
        return admission.may_schedule(self, req)

    def init_req_max_new_tokens(self, req: Req) -> None:
        """Also counts what adapters take of the pool. Mutates ``req``, which may be aborted with status 400."""
        super().init_req_max_new_tokens(req)
        admission.limit_new_tokens(self, req)

    # -- one iteration --------------------------------------------------------------------------------------

    def _add_request_to_queue(self, req: Req, is_retracted: bool = False) -> None:
        """What the request needs can start moving as soon as it waits."""
        super()._add_request_to_queue(req, is_retracted)
        # SGLang refuses a request by not queuing it.
        if self.waiting_queue and self.waiting_queue[-1] is req:
            self._note_queued(req)

    def _process_hicache_events(self, should_retry_storage_prefetch: bool = True) -> None:
        """Once per iteration, before the next batch is formed: the swapper decides, and the auditor looks.

        Rows and tree agree at this point in both event loops.
        """
        super()._process_hicache_events(should_retry_storage_prefetch)
        self._tick()
        self._audit()

    def run_batch(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        """The batch first waits until copies of slots that it may overwrite have been made."""
        self._note_batch(batch)
        if self.tree_cache.tier is not None:
            self.tree_cache.tier.engine.before_forward(batch.out_cache_loc)
        return super().run_batch(batch, *args, **kwargs)

    def process_batch_result(self, batch: ScheduleBatch, result: Any) -> None:
        """How long the batch took refines the costs."""
        super().process_batch_result(batch, result)
        self._time_batch(batch)

    # -- adapters -------------------------------------------------------------------------------------------

    def load_lora_adapter(self, recv_req: LoadLoRAAdapterReqInput) -> LoRAUpdateOutput:
        """Refuses an adapter that the pool cannot hold."""
        return scheduler_side.load(super().load_lora_adapter, self, recv_req)

    def load_lora_adapter_from_tensors(
        self, recv_req: LoadLoRAAdapterFromTensorsReqInput
    ) -> LoRAUpdateOutput:
        """The same for tensors in the request.

        Does not call the stock method: its worker unpickles the tensors, and here they come as safetensors bytes.
        """
        return scheduler_side.load(self._load_tensors, self, recv_req)

    def _load_tensors(self, recv_req: LoadLoRAAdapterFromTensorsReqInput) -> LoRAUpdateOutput:
        return scheduler_side.load_from_tensors(self.tp_worker.model_runner.lora_manager, recv_req)

    def unload_lora_adapter(self, recv_req: UnloadLoRAAdapterReqInput) -> LoRAUpdateOutput:
        """Drops the adapter's branch of the tree with its weights; refused while one of its requests runs."""
        return scheduler_side.unload(super().unload_lora_adapter, self, recv_req)

    # -- state ----------------------------------------------------------------------------------------------

    def get_internal_state(self, recv_req: GetInternalStateReq) -> GetInternalStateReqOutput:
        """Adds ``elora`` to the state in ``/server_info``."""
        output = super().get_internal_state(recv_req)
        output.internal_state["elora"] = msgspec_to_builtins(cache_state.of(self.tree_cache))
        return output

    # -- what the cache is told -----------------------------------------------------------------------------

    def _note_queued(self, req: Req) -> None:
        self.tree_cache.enqueued(req)

    def _note_batch(self, batch: ScheduleBatch) -> None:
        """The queue's logical time counts batches."""
        mode = batch.forward_mode
        if not mode.is_idle():
            prefills = mode.is_extend()
            rids = [req.rid for req in batch.reqs] if prefills else []
            self.tree_cache.manager.batch(rids, mode.is_mixed() or not prefills)

    def _tick(self) -> None:
        chunked, promised = self.chunked_req, 0
        if chunked is not None:
            left = len(chunked.full_untruncated_fill_ids) - (chunked.extend_end or 0)
            promised = max(left, 0) + 2 * self.tree_cache.page_size
        self.tree_cache.tick(len(self.running_batch.reqs), bool(self.waiting_queue), promised)

    def _audit(self) -> None:
        auditor = self.tree_cache.auditor
        if auditor is None or not auditor.due():
            return
        batches = (self.running_batch, self.last_batch, self.cur_batch_for_debug)
        requests = [req for batch in batches if batch is not None for req in batch.reqs]
        if self.chunked_req is not None:
            requests.append(self.chunked_req)
        auditor.require_clean(requests)

    def _time_batch(self, batch: ScheduleBatch) -> None:
        meter = self.tree_cache.meter
        if meter is None:
            return
        now = time.monotonic()
        if batch.forward_mode.is_extend() and batch.launch_ts is not None:
            meter.prefill(batch.launch_ts, now, batch.extend_num_tokens or 0)
        else:
            meter.decode(now)
