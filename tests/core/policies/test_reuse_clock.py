"""The clock of uses: it finds the pace of the traffic, and changing pace changes no order."""

from __future__ import annotations

import math
import random

import pytest
from support.policy_bench import Bench

from elora_sglang.core.hints import Hints
from elora_sglang.core.policies.elora import Elora
from elora_sglang.core.policies.paper import Paper
from elora_sglang.core.policies.support.reuse_clock import (
    LEAST_GAPS,
    LONGEST_S,
    SHORTEST_S,
    STANDARD_S,
    ReuseClock,
)


def taught(gaps: list[float]) -> ReuseClock:
    clock = ReuseClock()
    for gap in gaps:
        clock.observe(gap)
    return clock


def test_it_shows_seconds_until_it_has_seen_enough() -> None:
    clock = taught([1.0] * (LEAST_GAPS - 1))
    clock.advance(5.0)
    assert clock.now == 5.0 and clock.half_life_s == STANDARD_S
    clock.observe(1.0)
    assert clock.half_life_s < STANDARD_S


@pytest.mark.parametrize("median", [8.0, 60.0, 150.0, 900.0])
def test_the_half_life_is_twice_the_median_gap(median: float) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    clock = taught([rng.lognormvariate(math.log(median), 1.0) for _ in range(600)])
    assert abs(math.log2(clock.half_life_s / (2 * median))) < 0.6  # five standard deviations of its wandering


def test_it_follows_when_the_pace_changes() -> None:
    clock = taught([200.0] * 300)
    slow = clock.half_life_s
    for _ in range(600):
        clock.observe(6.0)
    assert slow == pytest.approx(400, rel=0.1) and clock.half_life_s == pytest.approx(12, rel=0.1)


@pytest.mark.parametrize(("gap", "half_life"), [(0.2, SHORTEST_S), (1e9, LONGEST_S)])
def test_the_half_life_stays_within_its_bounds(gap: float, half_life: float) -> None:
    assert taught([gap] * 2000).half_life_s == half_life


def test_what_begins_alike_at_one_moment_is_no_conversation() -> None:
    assert taught([0.0, 0.05] * 500).half_life_s == STANDARD_S


def test_time_goes_on_at_the_new_pace_only_from_now_on() -> None:
    clock = ReuseClock()
    clock.advance(100.0)
    for _ in range(400):
        clock.observe(15.0)
    assert clock.now == 100.0
    clock.advance(100.0 + clock.half_life_s)
    assert clock.now == pytest.approx(100.0 + STANDARD_S)


def test_a_changed_pace_keeps_the_order_of_nodes_that_are_not_used() -> None:
    policy = Elora()
    bench = Bench(policy)
    nodes = []
    for i in range(6):
        bench.at(10.0 * i)
        nodes.append(bench.kv(100 * i, size=1 + i % 3))
        bench.use(nodes[-1], times=1 + i * i % 5)
    before = sorted(range(6), key=lambda i: policy.priority(nodes[i]))
    for _ in range(400):
        policy._clock.observe(11.0)
    bench.at(500.0)
    late = bench.kv(999, size=1)
    assert sorted(range(6), key=lambda i: policy.priority(nodes[i])) == before
    # 22 s are a half-life now, and what was used minutes ago has lost to what was not used again yet.
    assert policy.priority(late) > max(policy.priority(node) for node in nodes)


@pytest.mark.parametrize("make", [Elora, Paper])
def test_conversations_teach_the_policy_their_gap(make: type[Elora] | type[Paper]) -> None:
    policy = make()
    bench = Bench(policy, device=10_000)
    for i in range(40):
        bench.at(20.0 * i)
        node = bench.kv(i)
        bench.at(20.0 * i + 12.0)
        bench.use(node)
    bench.at(1000.0)
    assert policy._clock.half_life_s == pytest.approx(24.0, rel=0.2)


@pytest.mark.parametrize("gap", [1.0, 3000.0])
def test_an_expected_return_only_becomes_more_probable_while_the_pace_changes(gap: float) -> None:
    policy = Elora()
    bench = Bench(policy)
    node = bench.kv(1)
    policy.on_finish(node, Hints(None, False, 400.0))
    worth = policy.priority(node)
    for second in range(1, 400):
        policy._clock.observe(gap)
        bench.at(float(second))
        assert policy.priority(node) >= worth
        worth = policy.priority(node)
        bench.tree.check()
