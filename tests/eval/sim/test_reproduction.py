"""The paper's experiments: a scene on small numbers, claims from known cells, and cells that are not computed twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elora_sglang.eval import reproduce
from elora_sglang.eval.reproduction import claims, gap, overhead, plan, reasons, scene, tables
from elora_sglang.eval.reproduction.scene import RESIDENT, Scene, Turns, measure
from elora_sglang.eval.support.state import State


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-ups of a few turns."""
    monkeypatch.setitem(scene.SPANS, "chat", (60.0, 10.0))
    monkeypatch.setattr(scene, "MOST_WARMUP_TURNS", 100)


def test_a_scene_tunes_searches_and_compares_at_each_baselines_own_load(short: None) -> None:
    found = measure(
        Scene("h800-llama-8b", "chat", 20),
        Turns(300, 120),
        baselines=("vllm",),
        loads=(0.5, 0.8),
        beside=("lru",),
        beside_of="vllm",
        sweep=(0.5,),
    )
    json.dumps(found)
    peak = found["peaks"]["vllm"]["rate"]
    assert 0 < peak < found["peaks"]["vllm"]["failed"] < 1.09 * peak
    assert found["knobs"]["vllm"]["slots"] > 0 and found["knobs"]["elora"] == {}
    places = [(cell["load"], cell["system"]) for cell in found["cells"]]
    assert places == [(load, name) for load in (0.5, 0.8) for name in ("vllm", "elora", RESIDENT, "lru")]
    times = [cell["figures"]["ttft"]["mean"] for cell in found["cells"][1:3]]
    assert claims.ratios([found], RESIDENT, claims.mean_ttft)[0] == times[0] / times[1] > 0.99
    assert all(cell["rate"] == pytest.approx(cell["load"] * peak) for cell in found["cells"])
    assert {point["system"] for point in found["curve"]} <= {"vllm", "elora"} and found["curve"]


def test_a_run_begins_with_the_sessions_under_way(short: None) -> None:
    work = Scene("h800-llama-8b", "chat", 20).traffic(4.0, 200, 1)
    early = [session for session in work.sessions() if session.start < 10.0]
    assert any(session.turns[0].new[0].tokens and len(session.turns[0].new) > 1 for session in early)


def figures(ttft: float, p99: float = 1.0) -> dict[str, Any]:
    return {"ttft": {"mean": ttft, "p99": p99}, "tpot": {"mean": 0.02}, "invalid_kv": 0.3}


def cell(of: str, load: float, system: str, ttft: float) -> dict[str, Any]:
    return {"of": of, "load": load, "system": system, "figures": figures(ttft)}


def results() -> claims.Results:
    pairs = [("vllm", 0.5, 0.4), ("vllm", 0.8, 0.2), ("s-lora", 0.5, 0.5), ("hicache", 0.5, 0.5)]
    grid = [
        cell(of, load, name, 1.0 if name == of else ratio)
        for of, load, ratio in pairs
        for name in (of, "elora")
    ]
    peaks = {
        name: {"rate": rate}
        for name, rate in (("vllm", 1.0), ("s-lora", 1.0), ("hicache", 1.0), ("elora", 1.8))
    }
    place = {"machine": "m", "workload": "chat", "adapters": 50, "skew": 0.9, "drift_s": 600.0}
    burst = {
        part: {"p50": seconds, "mean": seconds, "requests": 9} for part, seconds in (("8", 0.1), ("16", 0.15))
    }
    times = {"elora": 0.2, "elora-without-cost": 0.25, "elora-without-recency": 0.2, "lru": 0.3}
    ablated = [cell("hicache", 0.8, name, ttft) for name, ttft in times.items()]
    less = place | {"memory": 0.125}
    scarce = [cell("static", 0.7, "static", 1.0), cell("static", 0.7, "elora", 0.9)]
    grid.append(cell("vllm", 0.5, RESIDENT, 0.4))
    return {
        "grid": [{"scene": place, "cells": grid, "peaks": peaks}],
        "scarce": [{"scene": less, "cells": scarce, "peaks": peaks}],
        "ablations": [{"scene": place, "cells": ablated, "peaks": peaks}],
        "many": [
            {
                "scene": place,
                "cells": [cell("vllm", 0.5, "vllm", 1.0), cell("vllm", 0.5, "elora", 0.5)],
                "peaks": peaks,
            }
        ],
        "burst": [{"stock": burst, "elora": burst}],
        "overhead": [{"mean_s": 1e-4, "nodes": 1000}],
    }


def test_claims_are_ratios_at_the_baselines_loads() -> None:
    found = results()
    assert all(all(row[:3]) for row in claims.rows(found))
    rows = {row[0]: row[2] for row in claims.rows(found)}
    assert rows["mean TTFT over a server with memory for everything, the grid"] == "+0.0 % (+0.0 to +0.0)"
    assert rows["mean TTFT against vLLM"] == "-70.0 % (-80.0 to -60.0)"
    assert rows["peak load against vLLM"] == "+80.0 % (+80.0 to +80.0)"
    assert rows["TTFT with LRU instead of the cost model"] == "1.50x (1.50 to 1.50)"
    assert rows["TTFT without one term of the score"] == "1.00x to 1.25x"
    assert rows["TTFT without the tree"] == "not run"
    best_share = "mean TTFT against the best static share, 1/2 to 1/8 of the memory"
    assert rows[best_share] == "-10.0 % (-10.0 to -10.0)"
    assert rows["invalid KV of vLLM"] == "+30.0 % (+30.0 to +30.0)"
    assert rows["match and update of the tree, a query"] == "0.10 ms with 1,000 nodes"
    aims = {aim.name: aim for aim in reproduce.aims(found)}
    assert aims["mean TTFT over tuned HiCache, the grid"].ok
    assert not aims["mean TTFT over stock, the grid"].ok
    assert aims["peak load over stock, 1/2 to 1/8 of the memory"].ok
    assert aims["median TTFT, 16 adapters over 8, 9 requests each"].value == pytest.approx(1.5)


RECORDED = json.loads(reasons.LATEST.read_text())


def test_every_recorded_figure_has_its_reason_and_every_reason_its_figure() -> None:
    rows, known = claims.rows(RECORDED["reproduction"]), reasons.read(reasons.LATEST)
    assert json.loads(reasons.beside(reasons.LATEST).read_text())["result"] == reasons.LATEST.name
    assert reasons.faults(rows, known) == []
    (stored,) = (table for table in RECORDED["tables"] if table["header"] == list(claims.HEADER))
    assert reasons.explained(rows, known) == stored["rows"], "as they were when it was recorded"


def test_a_reason_for_a_figure_that_is_not_there_is_found_and_not_shown() -> None:
    rows, known = claims.rows(RECORDED["reproduction"]), reasons.read(reasons.LATEST)
    known["no-such-claim"] = {"figure": "1", "why": "because"}
    known["mean-ttft-against-vllm"] = known["mean-ttft-against-vllm"] | {"figure": "-1.0 %"}
    del known["p99-ttft-against-vllm"]
    found = reasons.faults(rows, known)
    assert [fault.partition(":")[0] for fault in found] == [
        "no-such-claim", "p99-ttft-against-vllm", "mean-ttft-against-vllm",
    ]  # fmt: skip
    shown = {row[0]: row[3] for row in reasons.explained(rows, known)}
    assert not shown["mean TTFT against vLLM"] and shown["peak load against vLLM"]


def test_reasons_are_carried_to_a_new_result_and_what_moved_is_said(tmp_path: Path) -> None:
    new = tmp_path / "new.json"
    found = {**RECORDED["reproduction"], "overhead": [{"mean_s": 1e-4, "nodes": 1000}]}
    new.write_text(json.dumps({"reproduction": found}))
    (moved,) = reasons.carry(new, reasons.LATEST)
    assert moved.startswith("match-and-update-of-the-tree-a-query: the reason is for ")
    assert moved.endswith("the result has 0.10 ms with 1,000 nodes")
    assert reasons.faults(claims.rows(found), reasons.read(new)) == []


def test_every_result_has_its_table() -> None:
    found = results() | {"skew": results()["many"], "drift": results()["many"]}
    made = {table.title.partition(":")[0]: table for table in tables.tables(found)}
    assert [table.name for table in made.values()] == [
        "claims", "grid", "ablations", "scarce", "many", "skew", "drift", "burst",
    ]  # fmt: skip
    assert all(len(row) == len(table.header) for table in made.values() for row in table.rows)


def test_the_gap_has_an_interval_over_samples() -> None:
    def one(number: int, elora: float) -> dict[str, Any]:
        costs = {"lru": 10.0, "elora": elora, "clairvoyant": 2.0}
        systems = {name: {"restore_s": cost} for name, cost in costs.items()}
        return {"memory": 0.02, "host": None, "sample": number, "systems": systems}

    samples = [one(0, 6.0), one(1, 4.0)]
    assert [gap.closed(sample, "elora") for sample in samples] == [0.5, 0.75]
    header, rows = gap.rows(samples)
    assert header[1:] == ["2%, host endless"] and rows == [["elora", "62 ± 159"]]
    assert gap.rows(samples[:1])[1] == [["elora", "50"]], "one sample has no interval"


def test_matching_and_updating_is_measured() -> None:
    found = overhead.measure()
    assert found["nodes"] > overhead.NODES / 2 and 0 < found["mean_s"] < 0.1


@pytest.mark.parametrize("jobs", [1, 2])
def test_finished_tasks_are_not_computed_again(tmp_path: Path, jobs: int) -> None:
    made = tmp_path / "made"
    made.mkdir()

    def task(number: int) -> plan.Task:
        def work() -> dict[str, int]:
            (made / f"{number}-{len(list(made.glob(f'{number}-*')))}").touch()
            return {"number": number}

        return plan.Task(("task", number), work)

    tasks = [task(number) for number in range(4)]
    for _ in range(2):
        found = reproduce.compute(tasks, State(tmp_path / "state"), jobs)
        assert [cell["result"] for cell in found] == [{"number": number} for number in range(4)]
        assert all(cell["seconds"] >= 0 and "commit" in cell for cell in found)
    assert len(list(made.iterdir())) == 4


def test_the_plan_covers_the_papers_grid() -> None:
    kinds = [str(task.key[0]) for task in plan.tasks(Turns(), Path("trace.jsonl"))]
    assert kinds.count("grid") == 27 and {"centre", "ablations", "many", "skew", "burst", "gap"} <= set(kinds)
    assert plan.complete(set(kinds)) and not plan.complete({"grid"})
    keys = [task.key for task in plan.tasks(Turns(), Path("trace.jsonl"))]
    assert len(set(keys)) == len(keys)
