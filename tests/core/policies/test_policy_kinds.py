"""Each policy does what its name says, on cases small enough to do by hand."""

from __future__ import annotations

import math

import pytest
from golden_policies import chat, run
from support.policy_bench import Bench

from elora_sglang.core.policies import create_policy
from elora_sglang.core.policies.paper import Paper
from elora_sglang.core.policies.paper_literal import PaperLiteral


def test_the_flag_accepts_a_hyphen() -> None:
    assert isinstance(create_policy("paper-literal"), PaperLiteral)


def test_lru_takes_the_least_recently_touched_and_lfu_the_least_often_used() -> None:
    for name, expected in (("lru", [1, 2, 0]), ("lfu", [1, 2, 0])):
        bench = Bench(name)
        nodes = [bench.kv(i) for i in range(3)]
        bench.use(nodes[1], nodes[2], nodes[0], times=1 if name == "lru" else 2)
        if name == "lfu":
            bench.use(nodes[0])  # one more than the others; node 1 was touched before node 2
        assert bench.order() == [nodes[i].id for i in expected], name
    bench = Bench("lfu")
    often, late = bench.kv(0), bench.kv(1)
    bench.use(often, times=3)
    bench.use(late, times=2)
    assert bench.order() == [late.id, often.id]  # lru would say the opposite


def test_slru_protects_what_was_used_again_from_a_scan() -> None:
    bench = Bench("slru", device=100)
    again = bench.kv(0)
    bench.use(again)
    scanned = [bench.kv(i) for i in range(1, 5)]
    assert bench.order() == [node.id for node in [*scanned, again]]


def test_rrip_keeps_what_was_used_through_a_scan_but_not_for_ever() -> None:
    bench = Bench("rrip", device=100)
    used = [bench.kv(i) for i in range(3)]
    bench.use(*used)
    for i in range(3, 10):
        bench.kv(i)
    gone = [victim.node_id for victim in bench.tree.evict(70)]
    assert not set(gone) & {node.id for node in used}
    # Each victim makes the others older: after two rounds what was used long ago is due, before what is new.
    for _ in range(2):
        fresh = [bench.kv(100 + i) for i in range(7)]
        bench.use(*fresh)
        bench.tree.evict(30)
    assert all(not node.resident for node in used)


def test_slru_bounds_its_protected_segment() -> None:
    bench = Bench("slru", device=50)  # protects 40 slots: four nodes
    nodes = [bench.kv(i) for i in range(6)]
    bench.use(*nodes[:5])  # the fifth pushes the first back to probation, as its newest
    assert bench.order() == [nodes[i].id for i in (5, 0, 1, 2, 3, 4)]


def test_gdsf_keeps_the_dearer_byte_and_ages_by_inflation() -> None:
    bench = Bench("gdsf")
    adapter, kv = bench.adapter("a", 10, host=True), bench.kv(0, 10)
    assert bench.policy.priority(adapter) < bench.policy.priority(kv)  # a load is cheaper than recomputing
    bench = Bench("gdsf")
    old = bench.kv(0)
    bench.use(old, times=2)
    for i in range(1, 9):  # every victim raises L, until a newcomer outranks the old favourite
        bench.kv(i)
        if bench.tree.evict(10)[0].node_id == old.id:
            break
    else:
        pytest.fail("inflation never reached the old node")
    assert i > 1


def test_chameleon_weighs_frequency_and_size_alike() -> None:
    bench = Bench("chameleon")
    small, large, often = bench.kv(0, 2), bench.kv(1, 20), bench.kv(2, 2)
    bench.use(often, times=9)
    bench.at(1.0)
    assert bench.policy.priority(small) == pytest.approx(0.45 / 10 + 0.10 / (1 + 1 / 60) + 0.45 * 2 / 20)
    assert bench.order()[0] == small.id
    assert bench.policy.priority(large) == pytest.approx(0.45 / 10 + 0.10 / (1 + 1 / 60) + 0.45)


def test_arc_learns_from_what_comes_back() -> None:
    bench = Bench("arc", device=40)
    policy = bench.policy
    twice, once = bench.kv(0), bench.kv(1)
    bench.use(twice)
    assert bench.tree.evict(10)[0].node_id == once.id  # T1 gives way, although it is younger
    assert policy.target == 0.0  # type: ignore[attr-defined]
    back = bench.kv(1)  # B1 remembers: into T2, and T1 may be larger
    assert policy.target == 10.0 and back.policy_state == "twice"  # type: ignore[attr-defined]
    new = bench.kv(3)
    assert new.policy_state == "within" and bench.order() == [twice.id, back.id, new.id]


def test_static_takes_from_the_side_that_is_over_its_share_and_leaves_invalid_kv() -> None:
    bench = Bench(create_policy("static", lora_share=0.3), device=100)
    one, two, three = (bench.adapter(key, 10) for key in "abc")  # 30 of 30 slots
    kv = bench.kv(0, 10, one)
    bench.use(two, three)
    assert bench.policy.side("kv", 30) == "kv" and bench.policy.side("adapter", 30) == "adapter"
    assert [v.node_id for v in bench.tree.evict(10, "adapter")] == [one.id]  # its KV stays, invalid
    assert kv.resident and bench.tree.invalid_kv_size == 10
    assert [v.node_id for v in bench.tree.evict(10, "kv")] == [kv.id]
    assert bench.tree.invalid_kv_size == 0


def test_only_static_has_invalid_kv_on_a_workload() -> None:
    workload = chat(5, sessions=60)
    tight = workload._replace(device=1600)
    assert run("static", tight).counts["invalid_kv"] > 0
    assert run("lru", tight).counts["invalid_kv"] == 0


def test_without_unified_any_policy_keeps_the_sides_apart() -> None:
    bench = Bench("lru", device=100, without="unified")
    first, kv = bench.adapter("a", 10), bench.kv(0, 10)
    bench.use(first)  # the adapter is the younger one, but room for an adapter comes from the adapters
    bench.adapter("b", 10)
    assert [v.node_id for v in bench.tree.evict(10, "adapter")] == [first.id]
    assert Bench("lru", device=100).policy.side("adapter", 99) is None and kv.resident


def literal(node_visits: int, age: float, size: int) -> float:
    """Eq. 5 as printed, in plain floating point."""
    return size * (1 + node_visits) * (1 - 1 / (1 + math.exp(-age)))


def test_paper_literal_orders_like_the_printed_formula_where_that_does_not_underflow() -> None:
    bench = Bench("paper_literal", device=10_000)
    nodes = []
    for i in range(30):
        bench.at(i * 0.5)
        nodes.append(bench.kv(i, 5 + 7 * i % 11))
        bench.use(nodes[-1], times=i % 4)
    bench.at(20.0)
    expected = sorted(nodes, key=lambda n: (literal(n.visits, 20.0 - n.last_use, n.size), n.id))
    assert bench.order() == [node.id for node in expected]


def test_paper_literal_keeps_an_order_where_the_printed_formula_has_none() -> None:
    bench = Bench("paper_literal")
    old, older_but_popular = bench.kv(0), bench.kv(1)
    bench.use(older_but_popular, times=50)
    bench.at(10.0)
    bench.use(old)
    bench.at(500.0)
    assert literal(50, 500.0, 10) == literal(1, 490.0, 10) == 0.0  # underflow
    assert bench.order() == [older_but_popular.id, old.id]  # ten seconds outweigh fifty uses: LRU in effect


def test_paper_lets_uses_count_for_minutes() -> None:
    bench = Bench("paper")
    popular, recent = bench.kv(0), bench.kv(1)
    bench.use(popular, times=50)
    bench.at(10.0)
    bench.use(recent)
    bench.at(500.0)
    assert bench.order() == [recent.id, popular.id]


def test_paper_scores_per_byte_and_the_literal_reading_by_the_whole_node() -> None:
    for name, smaller_first in (("paper", False), ("paper_literal", True)):
        bench = Bench(name)
        large, small = bench.kv(0, 40), bench.kv(1, 2)
        assert bench.order() == ([small.id, large.id] if smaller_first else [large.id, small.id]), name


@pytest.mark.parametrize("name", ["paper", "paper_literal"])
def test_the_sign_of_eq_4(name: str) -> None:
    bench = Bench(name)
    adapters = [bench.adapter(key, 10, host=True) for key in "abcdefgh"]
    kv = bench.kv(0, 10)
    bench.batch_size = 64.0
    bench.use(*adapters, bench.tree.base, times=3)
    bench.use(kv)
    before = bench.policy.priority(adapters[0])
    for one in adapters[2:]:
        bench.tree.set_pinned(one, True)
    bench.tree.evict(10)  # one gone: fewer on the device than the batch wants
    left = next(one for one in adapters if one.resident and not one.pinned)
    for second in range(1, 4):
        bench.at(float(second))
    # as printed the score of an adapter falls when too few are left, as meant it rises (age aside)
    age = 1 - math.exp(0) if name == "paper" else 0
    assert age == 0
    assert (left.policy_state.bits > 0) if name == "paper" else (left.policy_state.bits < 0), (
        before,
        left.policy_state.bits,
    )


def test_terms_of_the_paper_can_be_switched_off() -> None:
    assert isinstance(Bench("paper", without="frequency").policy, Paper)
    bench = Bench("paper", without="frequency")
    popular, recent = bench.kv(0), bench.kv(1)
    bench.use(popular, times=50)
    bench.at(10.0)
    bench.use(recent)
    assert bench.order() == [popular.id, recent.id]
    bench = Bench("paper", without="recency")
    popular, recent = bench.kv(0), bench.kv(1)
    bench.use(popular, times=2)
    bench.at(1e6)
    bench.use(recent)
    assert bench.order() == [recent.id, popular.id]
