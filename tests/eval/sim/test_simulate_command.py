"""The command ``simulate``: one table for people, one object for machines, one line for mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from elora_sglang.eval.cli import main

SMALL = [
    "simulate",
    "--workload",
    "chat",
    "--rate",
    "3",
    "--duration",
    "60",
    "--adapters",
    "12",
    "--jobs",
    "1",
]


def result(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main([*SMALL, "--json", *more]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_the_same_seed_gives_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    def figures() -> Any:
        found = result(capsys, "--policies", "lru,elora,clairvoyant,stock", "--memory", "0.6", "--host", "2")
        for values in found["sizes"][0]["systems"].values():
            assert values.pop("wall_s") > 0
        assert found.pop("requests_a_minute") > 0
        return found

    first = figures()
    assert first == figures()
    (size,) = first["sizes"]
    assert set(size["systems"]) == {"lru", "elora", "clairvoyant", "stock"}
    assert size["host_slots"] == 2 * size["device_slots"]
    assert size["systems"]["stock"]["knobs"]["slots"] > 0
    counts = {values["requests"] for values in size["systems"].values()}
    assert len(counts) == 1 and counts.pop() > 50
    for values in size["systems"].values():
        assert values["restore_s"] >= size["bound_s"] > 0


def test_two_processes_give_what_one_gives(capsys: pytest.CaptureFixture[str]) -> None:
    def restore(*more: str) -> list[float]:
        found = result(capsys, "--policies", "lru,paper", "--memory", "0.3,0.5", *more)
        return [values["restore_s"] for size in found["sizes"] for values in size["systems"].values()]

    assert restore() == restore("--jobs", "2")


def test_hints_reach_the_policy(capsys: pytest.CaptureFixture[str]) -> None:
    talk = ["--set", "turns=6", "--set", "think_s=10", "--set", "think_most=60"]

    def cost(*more: str) -> float:
        found = result(capsys, *talk, "--policies", "elora", "--memory", "0.3", "--host", "0", *more)
        return float(found["sizes"][0]["systems"]["elora"]["restore_s"])

    assert cost("--hint-recall", "1") < cost()


def test_the_table_names_gap_and_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--policies", "lru,clairvoyant", "--memory", "0.3", "--host", "inf"]) == 0
    text = capsys.readouterr().out
    lru, clairvoyant = (
        line.split() for line in text.splitlines() if line.startswith(("lru ", "clairvoyant "))
    )
    assert "30% of the footprint, host infx" in text and lru[-2] == "0" and clairvoyant[-2] == "100"
    assert float(lru[-1]) >= float(clairvoyant[-1]) >= 1.0


def test_a_trace_plays_as_well(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [
        {"timestamp": 500 * i, "input_length": 1024, "output_length": 8, "hash_ids": [0, 1 + i % 5]}
        for i in range(40)
    ]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["simulate", "--trace", str(trace), "--adapters", "4", "--block-tokens", "512", "--jobs", "1"]
    assert main([*arguments, "--policies", "lru,elora", "--memory", "0.5", "--json"]) == 0
    systems = json.loads(capsys.readouterr().out)["sizes"][0]["systems"]
    assert systems["elora"]["requests"] == systems["lru"]["requests"] > 30


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--policies", "lru,best"], "argument --policies/--systems: there is no best; there are: stock,"),
        (["--memory", "half"], "argument --memory: 'half' is not a number of at least 0"),
        (["--profile", "h900"], "no machine profile 'h900'; there are: h100x2-llama-8b, h200-llama-8b"),
        (
            ["--policies", "stock", "--memory", "0.0001"],
            "holds no adapter buffer of the largest rank beside KV",
        ),
        (["--trace", "x"], "and not both"),
    ],
)
def test_a_mistake_is_one_line(more: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match="simulate: ") as failure:
        main([*SMALL, *more])
    assert words in str(failure.value) and "\n" not in str(failure.value)
