"""Ticks travel with the requests that SGLang broadcasts, and only where there are several ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.managers.scheduler  # noqa: F401  SGLang's modules import each other; this order works
from sglang.srt.managers.scheduler_components import request_receiver

from elora_sglang.integration.scheduler.receiver import TickReceiver
from elora_sglang.runtime.ticks import Tick, TickSource


def receiver(*, shared: bool) -> TickReceiver:
    fields: dict[str, Any] = dict.fromkeys(
        (
            *("recv_from_tokenizer", "recv_from_rpc", "recv_skipper", "input_blocker", "mm_receiver"),
            *("server_args", "model_config", "stream_output", "get_last_batch"),
        )
    )
    stock = request_receiver.SchedulerRequestReceiver(**fields, max_recv_per_poll=7)
    ticks = TickSource(lambda: [(3, True)], lambda: None, shared=shared, clock=lambda: 1.0)
    made = TickReceiver.over(stock, ticks)
    assert made.max_recv_per_poll == 7, "it works as the stock one does"
    return made


def test_one_rank_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel = SimpleNamespace(attn_dp_enabled=False, tp_size=1)
    monkeypatch.setattr(request_receiver, "get_parallel", lambda: parallel)
    alone = receiver(shared=False)
    assert alone._broadcast_reqs_across_ranks(["a"], ["b"]) == ["a", "b"]
    assert alone.ticks.arrived == []


def test_all_ranks_get_rank_0s_tick_and_only_the_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    group = SimpleNamespace(rank=0, cpu_group=None, ranks=[0, 1])
    parallel = SimpleNamespace(attn_dp_enabled=False, tp_size=2, tp_group=group)
    monkeypatch.setattr(request_receiver, "get_parallel", lambda: parallel)
    sent: list[list[Any]] = []

    def broadcast(data: Any, rank: int, *args: Any, **kwargs: Any) -> Any:
        if data is not None:
            sent.append(data)
        return sent[-1]

    monkeypatch.setattr(request_receiver, "broadcast_pyobj", broadcast)
    first, second = receiver(shared=True), receiver(shared=True)
    assert first._broadcast_reqs_across_ranks(["a"]) == ["a"]
    assert second._broadcast_reqs_across_ranks(None) == ["a"]
    tick = Tick(0.0, ((3, True),), None)
    assert first.ticks.due() == second.ticks.due() == [tick]
