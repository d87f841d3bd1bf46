"""The scheduler's request receiver, which also brings rank 0's tick to every rank."""

from __future__ import annotations

import dataclasses
from typing import Any

from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

from elora_sglang.runtime.ticks import Tick, TickSource


@dataclasses.dataclass(kw_only=True, frozen=True)
class TickReceiver(SchedulerRequestReceiver):
    """SGLang's receiver (``managers/scheduler_components/request_receiver.py``) with ticks among the requests.

    Time, finished copies and costs differ between ranks, and decisions must not. So all ranks use what rank 0
    saw, and it travels with the requests that SGLang broadcasts once per iteration anyway. With one rank nothing
    is sent: the cache takes its tick where it uses it.
    """

    ticks: TickSource

    @classmethod
    def over(cls, stock: SchedulerRequestReceiver, ticks: TickSource) -> TickReceiver:
        """A receiver that works as ``stock`` does. Mutates nothing."""
        fields = {field.name: getattr(stock, field.name) for field in dataclasses.fields(stock)}
        return cls(**fields, ticks=ticks)

    def _broadcast_reqs_across_ranks(
        self, recv_reqs: list[Any] | None, local_reqs: list[Any] | None = None
    ) -> list[Any]:
        if not self.ticks.shared:
            return super()._broadcast_reqs_across_ranks(recv_reqs, local_reqs)
        if recv_reqs is not None:  # on rank 0
            recv_reqs = [*recv_reqs, *self.ticks.take()]
        received = super()._broadcast_reqs_across_ranks(recv_reqs, local_reqs)
        self.ticks.arrived.extend(item for item in received if isinstance(item, Tick))
        return [item for item in received if not isinstance(item, Tick)]
