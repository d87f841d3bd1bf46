"""Costs, ghosts, path digests and the demand for adapters."""

from __future__ import annotations

import dataclasses

import pytest
from support.policy_bench import Bench

from elora_sglang.core.costs import Costs
from elora_sglang.core.policies.support.adapter_demand import SLICE, AdapterDemand, RoundRobin
from elora_sglang.core.policies.support.ghosts import Ghost, GhostList, ghost_key
from elora_sglang.core.policies.support.path_digests import path_digests


def test_costs_are_what_the_figures_say() -> None:
    costs = Costs(1000, 1e6, 5e5, 1e5, 0.5, 0.01, 0.001)
    assert costs.load_s(10) == 0.5 + 0.01
    assert costs.save_s(10) == 0.5 + 0.02
    assert costs.disk_s(10) == 0.5 + 0.1
    # tokens 5, 6 and 7 see 5, 6 and 7 tokens before them
    assert costs.recompute_s(5, 3) == pytest.approx(3 * 0.01 + (5 + 6 + 7) * 0.001)
    assert costs.recompute_s(0, 8) == pytest.approx(costs.recompute_s(0, 5) + costs.recompute_s(5, 3))


def test_costs_survive_json() -> None:
    costs = dataclasses.replace(Costs.default(), load_bytes_s=1.0 / 3.0)
    assert Costs.from_json(costs.to_json()) == costs
    with pytest.raises(ValueError, match="need exactly the fields"):
        Costs.from_json('{"slot_bytes": 1}')


@pytest.mark.parametrize(
    ("field", "value"),
    [("slot_bytes", 0), ("load_bytes_s", -1.0), ("disk_bytes_s", float("nan")), ("latency_s", -1e-9)],
)
def test_impossible_costs_are_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(Costs.default(), **{field: value})


def test_a_ghost_list_is_bounded_and_forgets_the_oldest() -> None:
    ghosts = GhostList(2)
    for i in range(3):
        ghosts.remember((None, bytes([i])), Ghost(float(i), 0.0, 0.0))
    assert len(ghosts) == 2 and ghosts.recall((None, b"\0")) is None
    assert ghosts.recall((None, b"\2")) == Ghost(2.0, 0.0, 0.0) and len(ghosts) == 1
    with pytest.raises(ValueError, match="at least one"):
        GhostList(0)


def test_ghost_keys_tell_adapters_and_paths_apart_but_not_cuts() -> None:
    bench = Bench("lru")
    a, b = bench.adapter("a"), bench.adapter("b")
    one, other, there = bench.kv(1, 10, a), bench.kv(2, 10, a), bench.kv(1, 10, b)
    keys = [ghost_key(node, 1) for node in (one, other, there, a, b)]
    assert len(set(keys)) == 5
    child = bench.longer(one, 5)
    before = ghost_key(child, 1)
    bench.tree.split_at(a, one.tokens + child.tokens, None, 4)
    assert ghost_key(child, 1) == before
    other_child = bench.longer(other, 5)
    assert ghost_key(other_child, 1) != before


def test_digests_follow_the_text_not_the_nodes() -> None:
    bench = Bench("lru", device=10_000)
    whole = bench.kv(1, 700)
    before = path_digests(whole)
    bench.tree.split_at(bench.tree.base, whole.tokens, None, 333)
    assert path_digests(whole) == before
    assert [place for place, _ in before] == [*range(16, 513, 16), 576, 640]
    longer = bench.longer(whole, 5, 100)
    assert path_digests(longer)[: len(before)] == before
    assert path_digests(bench.kv(2, 700))[0] != before[0]


def test_low_lora_is_the_expected_number_of_distinct_adapters() -> None:
    bench = Bench("lru")
    bench.batch_size = 3.0
    demand = AdapterDemand(300.0)
    for adapter, uses in (("a", 2), ("b", 1), (None, 1)):
        for _ in range(uses):
            demand.use(adapter, 0.0)
    demand.tick(bench)
    assert demand.low_lora == pytest.approx((1 - 0.5**3) + (1 - 0.75**3))


def test_low_lora_is_added_up_in_slices() -> None:
    bench = Bench("lru")
    bench.batch_size = 1.0
    demand = AdapterDemand(300.0)
    for i in range(2 * SLICE + 1):
        demand.use(f"a{i}", 0.0)
    for _ in range(2):
        demand.tick(bench)
        assert demand.low_lora == 0.0
    demand.tick(bench)
    assert demand.low_lora == pytest.approx(1.0)


def test_a_rota_gives_everybody_a_turn() -> None:
    bench = Bench("lru")
    turns, nodes = RoundRobin(), [bench.kv(i) for i in range(5)]
    for node in nodes:
        turns.add(node)
    turns.discard(nodes[2])
    assert turns.take(3) == [nodes[0], nodes[1], nodes[3]]
    assert turns.take(3) == [nodes[4], nodes[0], nodes[1]]
    assert turns.take(99) == [nodes[3], nodes[4], nodes[0], nodes[1]] and len(turns) == 4
