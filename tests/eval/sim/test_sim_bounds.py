"""The clairvoyant reference and the lower bound: nobody goes below the bound, and knowing the future helps."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.sim_world import MACHINE, of, random_workload, single

from elora_sglang.eval.sim.bound import lower_bound
from elora_sglang.eval.sim.clairvoyant import Clairvoyant
from elora_sglang.eval.sim.future import foresee
from elora_sglang.eval.sim.run import simulate
from elora_sglang.eval.sim.systems import systems
from elora_sglang.eval.workloads.model import Workload

SYSTEMS = systems()
COSTS = MACHINE.costs(1)


def cost(workload: Workload, system: str, device: int, host: int, **knobs: Any) -> float:
    found = simulate(
        workload,
        SYSTEMS[system],
        MACHINE,
        block_tokens=1,
        device_slots=device,
        host_slots=host,
        future=foresee(workload, 1) if system == "clairvoyant" else None,
        audit=True,
        **knobs,
    )
    assert not found.outcome.refused
    return float(found.figures["restore_s"])


def sizes(workload: Workload) -> dict[str, int]:
    return {a.name: MACHINE.adapter_slots(a.rank, 1) for a in workload.header.adapters}


@pytest.mark.parametrize("device", [500, 900, 4000])
@pytest.mark.parametrize("host", [0, 600, 10**6])
def test_no_policy_goes_below_the_bound(device: int, host: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    workload = random_workload(seed)
    bound = lower_bound(foresee(workload, 1), COSTS, sizes(workload), device_slots=device, host_slots=host)
    assert 0 < bound.least <= bound.most
    for system in ("lru", "elora", "static", "clairvoyant"):
        assert cost(workload, system, device, host) >= bound.least * (1 - 1e-9), system


def test_more_memory_lowers_the_bound() -> None:
    workload = random_workload(7)
    future = foresee(workload, 1)
    found = [
        lower_bound(future, COSTS, sizes(workload), device_slots=device, host_slots=0).least
        for device in (0, 100, 400, 1600, 10**9)
    ]
    assert found == sorted(found, reverse=True) and found[-1] < found[1] < found[0]


def test_the_bound_of_one_object_is_exact() -> None:
    # Two requests of one prompt of 100 tokens, 10 s apart, no adapter: kept, or recomputed.
    pair = of([single("a", 0.0, 100, 1, adapter=None), single("b", 10.0, 100, 1, adapter=None)], adapters=0)
    future = foresee(pair, 1)
    kept = lower_bound(future, COSTS, {}, device_slots=99, host_slots=0)
    assert kept.least == pytest.approx(0.0) and kept.most == pytest.approx(0.099)
    half = lower_bound(future, COSTS, {}, device_slots=33, host_slots=0)
    assert half.least == pytest.approx(0.066)
    loaded = lower_bound(future, COSTS, {}, device_slots=0, host_slots=99)
    assert loaded.least == pytest.approx(99 * 1e-6)


def test_the_clairvoyant_knows_the_next_use_of_what_was_served() -> None:
    workload = of([single(f"s{i}", float(i), 5, 1, adapter=i % 2, piece=1 + i % 2) for i in range(4)])
    future = foresee(workload, 1)
    clairvoyant = Clairvoyant(future)
    first = next(iter(future.uses))
    assert clairvoyant.coming("a0") == 0.0 and clairvoyant.coming("a1") == 1.0
    clairvoyant.serve("s0/0")
    assert clairvoyant.coming("a0") == 2.0 and clairvoyant.coming(first) == 2.0
    clairvoyant.serve("s2/0")
    assert clairvoyant.coming("a0") == float("inf") and clairvoyant.coming(first) == float("inf")
    assert clairvoyant.now == 2.0


def test_the_clairvoyant_keeps_what_comes_back() -> None:
    """One prompt returns, fillers never do; LRU drops the one that returns, the clairvoyant a filler."""
    sessions = []
    for i in range(12):
        if i % 4 == 0:
            sessions.append(single(f"again{i}", 10.0 * i, 300, 1, adapter=None, piece=1))
        else:
            sessions.append(single(f"filler{i}", 10.0 * i, 300, 1, adapter=None, piece=100 + i))
    workload = of(sessions, adapters=0)
    assert cost(workload, "clairvoyant", 700, 0) == pytest.approx(0.0)
    assert cost(workload, "lru", 700, 0) == pytest.approx(2 * 0.299)


def test_knowing_the_future_helps_on_the_whole() -> None:
    seeds = [random.randrange(10**6) for _ in range(4)]
    print(f"seeds {seeds}")
    workloads = [random_workload(seed, sessions=60) for seed in seeds]
    costs = {s: sum(cost(w, s, 1600, 0) for w in workloads) for s in ("lru", "clairvoyant")}
    assert costs["clairvoyant"] < 0.8 * costs["lru"]
