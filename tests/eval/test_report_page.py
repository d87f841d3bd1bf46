"""The page of results: every system and figure of the JSON is on it, and nothing else is needed to see it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from elora_sglang.eval.cli import main
from elora_sglang.eval.pages import page
from elora_sglang.eval.pages.figures import ablation_ratios
from elora_sglang.eval.reproduction import reasons


def simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Path:
    arguments = ["simulate", "--workload", "chat", "--rate", "4", "--duration", "120", "--adapters", "8"]
    memory = ["--memory", "0.6", "--policies", "stock,lru,elora,clairvoyant", "--jobs", "1", "--json"]
    assert main([*arguments, *memory, *more]) == 0
    path = tmp_path / "chat<run>.json"
    path.write_text(capsys.readouterr().out)
    return path


def test_a_page_holds_tables_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = simulated(tmp_path, capsys, "--series")
    out = tmp_path / "page"
    assert main(["report", str(run), "--out", str(out)]) == 0
    text = (out / "index.html").read_text()
    for system in ("stock", "lru", "elora", "clairvoyant"):
        assert f"<td>{system}</td>" in text
    assert "chat&lt;run&gt;" in text and "<run>" not in text
    assert not re.search(r"(src|href)=\"(?!data:image/png;base64,|#)", text), (
        "it needs nothing from elsewhere"
    )
    images = {path.name: path.read_bytes() for path in out.glob("*.png")}
    # bars, cost, distribution; and memory and adapters over time of stock, lru and elora
    assert len(images) == 3 + 2 * 3 == text.count("<figure>")
    assert all(data.startswith(b"\x89PNG") for data in images.values())


def test_without_series_there_are_no_pictures_over_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = simulated(tmp_path, capsys)
    assert main(["report", str(run), "--out", str(tmp_path / "page")]) == 0
    assert len(list((tmp_path / "page").glob("*.png"))) == 2


def test_ablations_are_compared_with_the_whole_beside_them() -> None:
    def cell(name: str, repeat: int, ttft: float) -> dict[str, object]:
        return {"name": name, "repeat": repeat, "summary": {"ttft_mean": ttft}}

    cells = [
        cell("elora#0", 0, 1.0), cell("elora-without-guard", 0, 1.1),
        cell("elora-without-guard", 1, 2.4), cell("elora#0", 1, 2.0),
        cell("elora#4", 0, 4.0), cell("elora-without-cost", 0, 2.0),
    ]  # fmt: skip
    assert ablation_ratios(cells) == {"guard": [1.1, 1.2], "cost": [0.5]}


@pytest.mark.parametrize(
    ("text", "words"), [("{", "Expecting"), ("[]", "not the JSON of"), (None, "No such file")]
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match="report: ") as failure:
        main(["report", str(path)])
    assert words in str(failure.value) and "\n" not in str(failure.value)


def test_old_results_whose_tables_have_no_names_get_the_same_figures(tmp_path: Path) -> None:
    results = Path(__file__).parents[2] / "eval" / "results" / "part3-reproduce.json"
    data = json.loads(results.read_text())
    assert all("name" not in table for table in data["tables"])
    names = [page.name_of(table) for table in data["tables"]]
    assert names[:4] == ["claims", "grid", "centre", "ablations"] and names[-1] == "gap"
    assert main(["report", str(results), str(reasons.beside(results)), "--out", str(tmp_path)]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 4, "reasons are no run of their own"


def test_a_name_without_figures_is_drawn_without() -> None:
    drawn = {"title": "The grid: renamed", "name": "switch", "header": [], "rows": []}
    assert page.name_of(drawn) == "switch" and "switch" not in page.DRAWN
    assert set(page.OLD_TITLES.values()) - {"claims"} == set(page.DRAWN)


def test_live_results_are_drawn(tmp_path: Path) -> None:
    results = Path(__file__).parents[2] / "eval" / "results" / "part2-live-2x.json"
    assert main(["report", str(results), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "index.html").read_text()
    rows = len(json.loads(results.read_text())["cells"]) // 3  # repeats
    assert text.count("<td>2x, ") >= rows and "Mean TTFT over rate" in text


def test_tables_of_other_commands_are_shown(tmp_path: Path) -> None:
    cells = [
        {"name": name, "rate_asked": rate, "repeat": 0, "summary": {"ttft_mean": 0.1 * rate}}
        for name in ("stock", "elora")
        for rate in (1.0, 2.0)
    ]
    data = {
        "run": {"commit": "abc", "versions": {"sglang": "0.5.23"}},
        "title": "Live servers on chat",
        "tables": [
            {
                "title": "a title",
                "header": ["system", "TTFT"],
                "rows": [["stock", "1"]],
                "name": "ttft-over-rate",
            },
            {
                "title": "another",
                "header": ["% of the way", "2%"],
                "rows": [["elora", "40 ± 5"]],
                "name": "gap",
            },
            {"title": "TTFT over rate", "header": ["x"], "rows": [["no name, no figure"]], "name": ""},
        ],
        "cells": cells,
    }
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(data))
    assert main(["report", str(path), "--out", str(tmp_path / "page")]) == 0
    text = (tmp_path / "page" / "index.html").read_text()
    assert "Live servers on chat" in text and "40 ± 5" in text and "abc" in text
    assert len(list((tmp_path / "page").glob("*.png"))) == 2
