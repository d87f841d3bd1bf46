"""Cells on disk, the table and the aims, on invented figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elora_sglang.eval.serving import report
from elora_sglang.eval.support.state import State

MEANS = {"stock": 1.0, "stock-overlap": 0.8, "hicache": 0.5, "static": 0.4, "elora": 0.3}


def cells(of: str = "stock", **changed: Any) -> list[dict[str, Any]]:
    found = []
    for repeat in range(3):
        for name, mean in MEANS.items():
            if of == "hicache" and name in ("stock", "stock-overlap"):
                continue
            figures = {
                "ttft_mean": mean * (1 + repeat / 10),
                **dict.fromkeys(("ttft_p50", "ttft_p95", "ttft_p99", "tpot_mean", "rate"), 0.5),
                "hit_device": 0.4,
                "hit_host": 0.2,
                "requests": 20,
            }
            if name in ("static", "elora"):
                figures["invalid_kv"] = 0.3 if name == "static" else 0.0
            found.append(
                {
                    "name": name, "system": name, "repeat": repeat, "factor": 2.0, "load": 0.7, "of": of,
                    "summary": figures, "answers": {"0/0/0": [1, 2]}, "ttft": [],
                    "counters": {"moved_load": 10.0, "moved_save": 5.0},
                }
                | changed.get(name, {})
            )  # fmt: skip
    return found


def data(**changed: Any) -> dict[str, Any]:
    tuning = [
        {"system": "stock", "factor": 2.0, "setting": 1, "ttft_mean": 1.0},
        {"system": "static", "factor": 2.0, "setting": 0.2, "ttft_mean": 0.5, "invalid_kv": 0.25},
        {"system": "static", "factor": 2.0, "setting": 0.5, "ttft_mean": 0.4, "invalid_kv": 0.0},
    ]
    both = cells(**changed) + cells("hicache", **changed)
    return {"cells": both, "ablations": [], "tuning": tuning}


def test_the_better_stock_is_the_reference_and_hicache_at_its_own_load() -> None:
    aims = {aim.name: aim for aim in report.aims(data())}
    over = aims["2x, 0.7 of stock: mean TTFT of elora over the best stock"]
    assert abs(over.value - 0.3 / 0.8) < 1e-9
    assert over.ok
    assert abs(aims["2x, 0.7 of hicache: mean TTFT of elora over tuned HiCache"].value - 0.6) < 1e-9
    assert all(aim.ok for aim in aims.values())


def test_a_different_answer_misses_an_aim() -> None:
    aims = report.aims(data(elora={"answers": {"0/0/0": [1, 3]}}))
    (aim,) = [aim for aim in aims if aim.name.startswith("answers that differ")]
    assert (aim.value, aim.ok) == (6, False)


def test_the_best_share_of_static_may_hold_all_but_its_default_wastes_memory() -> None:
    names = {aim.name: aim for aim in report.aims(data())}
    wasted = names["2x, tuning: invalid KV of static at its default share 0.2"]
    assert wasted.ok and wasted.value == 0.25
    assert [n for n in names if "invalid KV of static" in n] == [wasted.name]
    none = data()
    none["tuning"][1]["invalid_kv"] = 0.1
    assert not {aim.name: aim for aim in report.aims(none)}[wasted.name].ok


def test_every_row_has_every_column() -> None:
    rows = report.rows(data())
    assert len(rows) == 2 * len(MEANS) - 2
    assert {len(row) for row in rows} == {len(report.HEADER)}


def test_adapter_hits_are_what_was_not_loaded_whoever_counts() -> None:
    groups = {name: [c for c in cells() if c["name"] == name] for name in ("stock", "elora")}
    for cell, loads in zip(groups["stock"], (4.0, 5.0, 6.0), strict=True):
        cell["counters"]["adapter_loads"] = loads
    for cell in groups["elora"]:
        cell["counters"]["elora.done.adapter_loads"] = 30.0
    assert report.adapter_hits(groups["stock"]) == pytest.approx(0.75)
    assert report.adapter_hits(groups["elora"]) == 0.0, "more loads than requests are no negative share"
    assert report.adapter_hits(cells()) is None


def test_answers_are_compared_and_left_out() -> None:
    assert report.answers(data()) == {"different": 0, "compared": 18, "examples": []}
    told = report.answers(data(elora={"answers": {"0/0/0": [1, 3]}}))
    assert told["different"] == 6 and told["examples"][0] == "elora 0/0/0"
    assert not any({"answers", "ttft"} & set(cell) for cell in report.without_answers(cells()))


def test_only_the_first_different_answer_of_a_session_counts() -> None:
    ours = {"0/0/0": [1], "0/0/10": [3], "0/0/9": [2], "1/0/0": [4], "1/1/0": [5]}
    theirs = {"0/0/0": [1], "0/0/9": [9], "0/0/10": [9], "1/0/0": [4]}
    assert report.differing(ours, theirs) == (3, ["0/0/9"])


def test_the_title_says_what_was_tuned_and_what_it_wasted() -> None:
    about = {
        "budget": {"device_tokens": 10, "host_tokens": 30, "adapters": 2}, "link_gbps": 0.05,
        "prefill_s_per_token": 1e-4, "profile": {"name": "a GPU", "sources": {"default": "guessed"}},
        "settings": {"repeats": 3, "seconds": 5.0}, "chosen": {"2x": {"stock": 2}}, "capacities": {"2x stock": 1.234},
    }  # fmt: skip
    text = report.title(data() | about)
    for words in ("0.050 GB/s", "a GPU (guessed)", "25 % at 0.2 (2x)", "{'2x stock': 1.23}", "3 interleaved"):
        assert words in text


def test_a_finished_cell_is_not_measured_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"value": len(calls)}

    assert State(tmp_path).cell(("a", 2.0), measure) == {"value": 1}
    assert State(tmp_path).cell(("a", 2.0), measure) == {"value": 1}
    assert State(tmp_path).cell(("a", 4.0), measure) == {"value": 2}
    assert State(tmp_path).has("a", 4.0)


def test_a_cell_that_failed_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        State(tmp_path).cell(("a",), fail)
    assert not State(tmp_path).has("a")
