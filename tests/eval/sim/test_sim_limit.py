"""A run that can only end above a limit is stopped; one that stays below is not touched."""

from __future__ import annotations

import pytest
from support.sim_world import MACHINE, of, single

from elora_sglang.eval.sim.limit import Limit, OverLimitError
from elora_sglang.eval.sim.run import Run, simulate
from elora_sglang.eval.sim.systems import systems

#: 100 prompts of 100 tokens, a tenth of a second each to prefill, 20 a second: twice what can be served.
CROWD = of([single(str(i), i / 20, 100, 2, adapter=None, piece=i + 1) for i in range(100)])


def run(limit: Limit | None) -> Run:
    return simulate(
        CROWD, systems()["lru"], MACHINE, block_tokens=1, device_slots=20_000, host_slots=0, limit=limit
    )


def test_a_hopeless_run_is_stopped() -> None:
    with pytest.raises(OverLimitError):
        run(Limit(0.2, 0.0, 100))


def test_a_run_within_the_limit_gives_the_same_figures() -> None:
    free = run(None)
    assert free.figures["ttft"]["mean"] > 1.0
    assert run(Limit(free.figures["ttft"]["mean"], 0.0, 100)).figures == free.figures


def test_what_was_answered_in_the_warm_up_does_not_count() -> None:
    with pytest.raises(OverLimitError):
        run(Limit(1.5, 0.0, 100))
    assert run(Limit(1.5, 5.0, 100)).figures["requests"] == 100
