"""``eval micro --parts iteration``: a life near memory pressure, what is timed adds up, the report has its shape."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import astuple

import pytest

from elora_sglang.core.manager import CacheManager
from elora_sglang.eval import micro
from elora_sglang.eval.cli import main
from elora_sglang.eval.support import reporting
from elora_sglang.eval.trees import iteration, life

NODES = 600


@pytest.fixture(scope="module", params=["elora", "lru"])
def grown(request: pytest.FixtureRequest) -> Iterator[life.Life]:
    yield iteration.grow(request.param, NODES)
    gc.unfreeze()


def test_the_life_evicts_saves_loads_and_forgets(grown: life.Life) -> None:
    before = grown.cache.manager.counters()
    found = iteration.measure(grown, 300)
    assert found["iterations"] == len(grown.spent) == 300
    did = found["did"]
    least = {"requests": 80, "kv_evictions": 50, "demoted": 20, "backed_up": 50, "host_evicted": 50}
    least |= {"queue_prefetches": 10, "adapter_load_backs": 5, "tokens_device": 1000, "tokens_host": 500}
    assert all(did.get(name, 0) >= count for name, count in least.items()), did
    counters = grown.cache.manager.counters()
    assert counters["swap_outs"] > before["swap_outs"] and counters["queue_loads"] > before["queue_loads"]
    assert found["running"] > 16 and 16 < found["waiting"] < 64
    assert "stalled" not in did and "failed_transfers" not in did
    tree = grown.cache.tree
    tree.check(lambda slots: slots.tolist())
    assert tree.host_size > 0.9 * grown.cache.manager.host_slots
    assert grown.world.allocator.available_size() < 0.1 * grown.world.allocator.size


def test_deciding_is_a_part_of_the_whole(grown: life.Life) -> None:
    grown.spent.clear()
    for _ in range(20):
        grown.step()
    assert all(0 < one.deciding < one.total for one in grown.spent), grown.spent
    assert all(0 < one.deciding_cpu < one.total_cpu for one in grown.spent), grown.spent


def test_every_event_counts_as_deciding_once(grown: life.Life, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a plan sets forward by an hour: the hour is in the deciding and in the total, once."""
    now = [0.0]
    monkeypatch.setattr(life.time, "perf_counter", lambda: now[0])
    plan = grown.cache.manager.swapper.plan

    def slow(free: int) -> list[object]:
        now[0] += 3600
        return list(plan(free))

    monkeypatch.setattr(grown.cache.manager.swapper, "plan", slow)
    while not now[0]:
        grown.step()
    assert (grown.spent[-1].total, grown.spent[-1].deciding) == (3600, 3600)


def test_two_lives_take_the_same_course() -> None:
    """Whatever the machine does: time is the life's own."""
    courses = []
    for _ in range(2):
        one = life.Life("elora", NODES, seed=5)
        for _ in range(60):
            one.step(hurry=True)
        for _ in range(60):
            one.step()
        courses.append((one.finished, astuple(one.cache.stats), one.cache.manager.counters()))
    assert courses[0] == courses[1]


def test_a_leak_stops_the_measurement(grown: life.Life) -> None:
    taken = grown.world.allocator.alloc(1)
    with pytest.raises(AssertionError, match="belong to nobody"):
        iteration.measure(grown, 1)
    grown.world.allocator.free(taken)


@pytest.mark.timeout(300)
def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["micro", "--parts", "iteration", "--iteration-nodes", str(NODES), "--iterations", "100"]
    assert main([*argv, "--policies", "lru", "slru", "--json", "--strict"]) == 0, "no aim at this size"
    report = json.loads(capsys.readouterr().out)
    assert report["aims"] == [] and "results" not in report
    assert [(r["policy"], r["nodes"], r["iterations"]) for r in report["iterations"]] == [
        ("lru", NODES, 100),
        ("slru", NODES, 100),
    ]
    for entry in report["iterations"]:
        assert 0.5 * NODES < entry["tree_nodes"] < 2 * NODES and entry["did"]["requests"] > 20
        for part in ("total", "deciding", "total_cpu", "deciding_cpu"):
            assert 0 < entry[part]["p50_ms"] <= entry[part]["p99_ms"] <= entry[part]["max_ms"]
        assert entry["deciding"]["mean_ms"] < entry["total"]["mean_ms"]


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(SystemExit, match=r"under nonsense at 600 nodes: ValueError: .*is not one of"):
        iteration.in_a_process("nonsense", 600, 100)


def _result(nodes: int, total: float, deciding: float) -> dict[str, object]:
    return {"policy": "lru", "nodes": nodes, "total": {"p99_ms": total}, "deciding": {"p99_ms": deciding}}


def test_aims_are_judged_by_p99_at_1e5_nodes() -> None:
    assert [(a.value, a.ok) for a in iteration.aims([_result(100_000, 1.0, 0.5)])] == [
        (1.0, True),
        (0.5, True),
    ]
    assert [a.ok for a in iteration.aims([_result(100_000, 1.01, 1.0)])] == [False, True]
    assert iteration.aims([_result(1_000, 9.0, 9.0)]) == []


def test_p99_leaves_out_the_worst_hundredth() -> None:
    summary = iteration._summary([0.001] * 985 + [0.002] * 14 + [0.5])
    assert (summary["p50_ms"], summary["p99_ms"], summary["max_ms"]) == (1.0, 2.0, 500.0)


def test_both_parts_make_one_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"mean_ms": 1.0, "p50_ms": 1.0, "p99_ms": 2.0, "max_ms": 3.0}
    parts = dict.fromkeys(("total", "deciding", "total_cpu", "deciding_cpu"), figures)
    entry = {"policy": "lru", "nodes": 100_000, **parts}
    asked = []
    monkeypatch.setattr(iteration, "measure_all", lambda *args: asked.append(args) or [entry])
    found = {"results": [], "not_compared": [], "interleaved": True, "requests": 60}
    monkeypatch.setattr(micro, "_tree_part", lambda args: found)
    assert main(["micro", "--quick", "--strict"]) == 1
    shown = capsys.readouterr().out
    assert shown.index("One request of 1024 tokens") < shown.index("A scheduler iteration in ELORA")
    assert "MISSED  P99 ms an iteration in ELORA at 100000 nodes, policy lru: 2 (aim: <= 1)" in shown
    assert asked == [(["elora", "lru"], (1_000, 100_000), 1_000)]
    assert isinstance(iteration.table([entry]), reporting.Table)


@pytest.mark.parametrize("argv", [["--iteration-nodes", "100"], ["--iterations", "5"]])
def test_sizes_that_show_nothing_get_one_clear_line(argv: list[str]) -> None:
    with pytest.raises(SystemExit, match="at least 500 nodes and at least 100"):
        main(["micro", "--parts", "iteration", *argv])


def test_every_event_of_the_manager_is_timed() -> None:
    manager = life.Life("lru", NODES).cache.manager
    assert isinstance(manager, CacheManager)
    from elora_sglang.core.manager import EVENTS

    assert all(hasattr(getattr(manager, name), "__wrapped__") for name in (*EVENTS, "ready"))
