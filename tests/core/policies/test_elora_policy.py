"""The score of policy ``elora``: its terms, ghosts, hints and the predictor's place in it."""

from __future__ import annotations

import random
from array import array

import pytest
from golden_policies import Serving, chat, churn, run, scan
from support.policy_bench import Bench

from elora_sglang.core.hints import Hints
from elora_sglang.core.policies import create_policy
from elora_sglang.core.policies.elora import Elora
from elora_sglang.core.tree.tree import Node


def test_uses_fade_with_a_half_life_of_five_minutes() -> None:
    bench = Bench("elora")
    four, one = bench.kv(0), bench.kv(1)
    bench.use(four, times=3)
    bench.at(590.0)
    bench.use(one)  # w = 1 + 2^-1.97 = 1.26 against 4 * 2^-1.97 = 1.02
    assert bench.order() == [four.id, one.id]
    bench = Bench("elora")
    four, one = bench.kv(0), bench.kv(1)
    bench.use(four, times=3)
    bench.at(290.0)
    bench.use(one)  # 1.51 against 2.05
    assert bench.order() == [one.id, four.id]


def test_what_has_a_host_copy_leaves_first_and_reading_a_file_is_dearest() -> None:
    bench = Bench("elora")
    dirty, clean = bench.kv(0), bench.kv(1)
    on_file, on_host = bench.adapter("a"), bench.adapter("b", host=True)
    bench.save(clean)  # nothing but its cost changed
    order = bench.order()
    assert set(order[:2]) == {clean.id, on_host.id} and set(order[2:]) == {dirty.id, on_file.id}
    assert order[-1] == on_file.id


def test_late_context_is_dearer_to_recompute() -> None:
    bench = Bench("elora", device=10**6)
    head = bench.kv(0, 20_000)
    late, early = bench.longer(head, 7, 50), bench.kv(1, 50)
    assert bench.policy.priority(late) > bench.policy.priority(early)


def test_on_the_host_a_copy_is_worth_what_it_saves() -> None:
    bench = Bench("elora")
    kv, adapter = bench.kv(0, 20), bench.adapter("a", 20, host=True)
    bench.save(kv)
    bench.tree.evict(40)
    # the same probability: a file read saved against a prefill saved, both less the load
    costs = bench.costs
    saved = {kv.id: costs.recompute_s(0, 20) - costs.load_s(20), adapter.id: costs.disk_s(20)}
    expected = sorted(saved, key=lambda id: saved[id])
    assert [victim.node_id for victim in bench.tree.evict_host(40)] == expected


def test_an_adapter_is_never_less_probable_than_the_kv_below_it() -> None:
    bench = Bench("elora", without="cost")
    adapter = bench.adapter("a")
    node = bench.kv(0, 10, adapter)
    for now in (5.0, 50.0, 400.0):
        bench.at(now)
        bench.use(node)
        bench.policy.on_finish(node, Hints("s", False, 30.0))
        assert bench.policy.priority(adapter) >= bench.policy.priority(node)


def test_waiting_requests_hold_their_adapter() -> None:
    for without, kept in (("", "b"), ("pressure", "a")):
        bench = Bench("elora", without=without)
        a, b = bench.adapter("a"), bench.adapter("b")
        bench.use(a, times=2)
        bench.waiting["b"] = 3
        bench.at(1.0)
        assert bench.order()[-1] == (a if kept == "a" else b).id, without
    bench = Bench("elora")
    a, b = bench.adapter("a"), bench.adapter("b")
    bench.use(a, times=2)
    bench.waiting["b"] = 3
    bench.at(1.0)
    bench.waiting["b"] = 0  # they were aborted: it falls without a use
    bench.at(1.1)
    assert bench.order() == [b.id, a.id]


def test_too_few_adapters_for_a_batch_count_more_against_kv() -> None:
    def adapter_first(without: str) -> bool:
        bench = Bench("elora", without=f"cost {without}", device=1000)
        adapters = [bench.adapter(f"a{i}", 10) for i in range(12)]
        bench.batch_size = 64.0
        bench.use(*adapters)
        kv = bench.kv(0, 10)
        bench.use(kv, times=2)
        for one in adapters[:9]:
            bench.tree.drop_branch(one)  # three are left of the twelve in demand
        for second in range(1, 4):
            bench.at(float(second))
        return bench.order()[0] != kv.id

    assert adapter_first("pressure") and not adapter_first("")


def test_counts_survive_eviction_as_ghosts() -> None:
    for without, expected in (("", [1, 0]), ("ghosts", [0, 1])):
        bench = Bench("elora", without=without)
        bench.use(bench.kv(0), times=8)
        bench.tree.evict(10)
        back = bench.kv(0)
        other = bench.kv(1)
        bench.use(other)
        assert bench.order() == [(back, other)[i].id for i in expected], without


def test_a_longer_text_takes_up_the_ghost_of_its_start() -> None:
    bench = Bench("elora")
    bench.use(bench.kv(0, 10), times=8)
    bench.tree.evict(10)
    tokens = array("q", [0, *range(1000, 1009), 5, 6, 7])
    assert bench.tree.insert(bench.tree.base, tokens, None, 13, 13).node.policy_state.weight > 8


# -- hints --------------------------------------------------------------------------------------------


def session(bench: Bench, first: int, turns: int, adapter: Node | None = None) -> Node:
    node = bench.kv(first, 10, adapter)
    for turn in range(1, turns):
        bench.use(node)
        node = bench.longer(node, turn)
    return node


@pytest.mark.parametrize("name", [None, "s"])
def test_the_end_of_a_session_frees_what_only_it_used(name: str | None) -> None:
    bench = Bench("elora", device=1000)
    stale = bench.kv(9, 10)
    bench.at(100.0)
    shared = bench.kv(0, 10)
    for other in (70, 71, 72):  # others used the shared start, and have left
        bench.use(shared)
        gone = bench.longer(shared, other)
        bench.policy.on_finish(gone, Hints("other" if name else None))
        bench.tree.evict(0)
    bench.use(shared)
    first = bench.longer(shared, 1)
    bench.use(first)
    last = bench.longer(first, 2)
    bench.policy.on_finish(last, Hints(name, True))
    order = bench.order()
    assert order[:2] == [last.id, first.id] and order.index(shared.id) > order.index(stale.id)


def test_a_session_that_comes_back_after_its_end_is_an_ordinary_one() -> None:
    bench = Bench("elora")
    node = session(bench, 0, 2)
    other = bench.kv(5)
    bench.policy.on_finish(node, Hints(None, True))
    bench.at(1.0)
    bench.use(node)
    assert bench.order()[0] == other.id


def test_an_expected_return_keeps_until_about_then() -> None:
    bench = Bench("elora")
    told, untold = bench.kv(0), bench.kv(1)
    bench.policy.on_finish(told, Hints(None, False, 60.0))
    bench.at(5.0)
    bench.use(untold, times=2)  # w = 3 against an expected return, as good as 7 uses
    assert bench.policy.priority(told) > bench.policy.priority(untold)
    bench.at(84.0)  # late, but within the slack
    assert bench.policy.priority(told) > bench.policy.priority(untold)
    bench.at(86.0)  # did not come: history only
    assert bench.policy.priority(told) < bench.policy.priority(untold)
    assert bench.order() == [told.id, untold.id]


def test_of_two_expected_returns_the_sooner_is_kept() -> None:
    bench = Bench("elora")
    late, soon = bench.kv(0), bench.kv(1)
    bench.policy.on_finish(soon, Hints(None, False, 30.0))
    bench.policy.on_finish(late, Hints(None, False, 400.0))
    bench.at(20.0)
    assert bench.order() == [late.id, soon.id]


def test_hints_can_be_switched_off() -> None:
    workload = chat(7, hints=True, sessions=80)._replace(device=1500)
    off = run("elora", workload, without=frozenset({"hints"}))
    assert off.order.hexdigest() == run("elora", workload, hints=False).order.hexdigest()
    assert off.order.hexdigest() != run("elora", workload).order.hexdigest()


def lie(workload_hints: Hints, rng: random.Random) -> Hints:
    if rng.random() < 0.5:
        return Hints(workload_hints.session, True)
    return Hints(workload_hints.session, False, rng.choice((0.0, 3.0, 5000.0)))


def test_right_hints_pay_and_wrong_ones_only_take_that_away() -> None:
    """The number of turns of these conversations is memoryless: without hints history knows little more than chance."""
    sums = [0, 0, 0]
    for seed in (6, 7, 8):
        workload = chat(seed, hints=True, sessions=120)._replace(device=2500)
        rng = random.Random(1)
        wrong = workload._replace(requests=[r._replace(hints=lie(r.hints, rng)) for r in workload.requests])
        runs = run("elora", workload), run("elora", workload, hints=False), run("elora", wrong)
        hits = [serving.counts["hit_tokens"] for serving in runs]  # run() checked the tree of each
        assert hits[0] > 1.3 * hits[1] and hits[2] < 0.8 * hits[0], hits
        sums = [total + one for total, one in zip(sums, hits, strict=True)]
    assert sums[2] < sums[1], sums


# -- terms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["frequency", "recency", "cost", "ghosts"])
def test_each_term_changes_decisions(term: str) -> None:
    orders = {
        run("elora", churn(9), without=frozenset(without)).order.hexdigest() for without in ((), (term,))
    }
    assert len(orders) == 2


def test_pressure_changes_decisions_when_the_device_is_short_of_adapters() -> None:
    def order(*without: str) -> str:
        workload = churn(9)._replace(device=900)
        serving = Serving(create_policy("elora"), workload, without=frozenset(without))
        serving.batch_size = 64.0
        for request in workload.requests[:400]:
            serving.serve(request)
        serving.tree.check()
        return serving.order.hexdigest()

    assert order() != order("pressure")


def test_the_predictor_acts_on_conversations_of_two_kinds_and_changes_decisions() -> None:
    workload = chat(7, sessions=600)
    acting = run("elora", workload)
    assert isinstance(acting.policy, Elora)
    predictor = acting.policy._predictor
    assert (predictor.predict("a1", 1) or 1) < 0.3
    off = run("elora", workload, without=frozenset({"predictor"}))
    assert acting.order.hexdigest() != off.order.hexdigest()


def test_scans_do_not_wash_out_what_is_used_again() -> None:
    workload = scan(8)
    assert run("elora", workload).counts["hit_tokens"] > 1.5 * run("lru", workload).counts["hit_tokens"]
