"""``eval micro`` on small trees: every system takes part, answers are right, the report has its shape."""

from __future__ import annotations

import json
from array import array

import pytest

from elora_sglang.eval import micro
from elora_sglang.eval.cli import main
from elora_sglang.eval.trees import worker
from elora_sglang.eval.trees.caches import SYSTEMS, build


@pytest.mark.timeout(600)
def test_all_systems_are_compared_in_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["micro", "--parts", "tree", "--nodes", "100,200", "--requests", "14", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["not_compared"] == []
    seen = {(r["system"], r["page_size"], r["nodes"]) for r in report["results"]}
    assert seen == {(name, page, nodes) for name in SYSTEMS for page in (1, 16) for nodes in (100, 200)}
    for entry in report["results"]:
        assert entry["request"]["samples"] == 4 and entry["evict"]["samples"] > 0
        assert 0 < entry["request"]["median_ms"] <= entry["request"]["p95_ms"]


def test_a_system_that_cannot_be_built_gets_a_row_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "sglang unified fortran"
    monkeypatch.setattr(micro, "SYSTEMS", (*SYSTEMS, name))
    argv = ["micro", "--parts", "tree", "--nodes", "100", "--requests", "12", "--pages", "1"]
    argv += ["--systems", "elora", name]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "sglang unified fortran" in shown and "not compared:" in shown and "'fortran' is not" in shown


@pytest.mark.parametrize("name", SYSTEMS)
def test_victims_are_counted_however_their_slots_are_freed(name: str) -> None:
    """Ten of twenty prompts have to go; a system that frees all their slots at once has evicted ten nodes, not one."""
    import torch

    system, slots = build(name, 1), torch.arange(16)
    system.register("a")
    for first in range(20):
        system.insert("a", array("q", range(100 * first, 100 * first + 16)), slots)
    assert system.victims == 0
    assert system.evict(160) == 160 and system.victims == 10


def _results(at_1e3: float, at_1e5: float, at_1e6: float) -> list[dict[str, object]]:
    sizes = {1_000: at_1e3, 100_000: at_1e5, 1_000_000: at_1e6}
    return [
        {"system": "elora", "page_size": 1, "nodes": nodes, "request": {"median_ms": value}}
        for nodes, value in sizes.items()
    ]


def test_aims_are_judged_by_the_medians() -> None:
    assert [aim.ok for aim in micro._aims(_results(0.05, 0.1, 0.1), [1])] == [True, True]
    assert [aim.ok for aim in micro._aims(_results(0.05, 0.101, 0.11), [1])] == [False, False]
    assert micro._aims(_results(1, 1, 1)[:1], [1, 16]) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--nodes", "10"], "need trees of at least 800 nodes"), (["--requests", "5"], "must be above 10")],
)
def test_impossible_sizes_get_one_clear_line(argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["micro", *argv])


def test_memory_decides_whether_systems_are_measured_in_turn() -> None:
    gigabytes = 10**9
    assert micro.fits_together([1000], 4, 24 * gigabytes)
    assert not micro.fits_together([1000, 10**6], 4, 16 * gigabytes)


def test_wrong_answers_stop_the_measurement() -> None:
    grown = worker.grow("elora", 1, 100, 2)
    grown.requests[-1] = (grown.requests[-1][0], grown.requests[-1][1][1:])
    with pytest.raises(AssertionError, match="wrong answers"):
        worker.measure_request(grown)
    worker.measure_request(grown)


def test_sizes_that_are_none_get_one_clear_line() -> None:
    with pytest.raises(SystemExit, match="micro: argument --nodes: '0' is not a whole number of at least 1"):
        main(["micro", "--nodes", "0,5"])
