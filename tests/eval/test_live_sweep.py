"""Rates and peaks of live systems: who is asked what, and what the tables say; no server is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from elora_sglang.eval.cli import main
from elora_sglang.eval.serving import sweep, systems
from elora_sglang.eval.serving.model import RANKS

BUDGET = systems.Budget(10240, 30720, 8, 16, RANKS)
#: Mean TTFT in seconds at a turn a second; it grows with the square of the rate.
SLOW = {"stock": 0.2, "hicache": 0.1, "elora": 0.05}


def figures(mean: float) -> dict[str, Any]:
    return {
        "requests": 100,
        "ttft": {"mean": mean, "p50": mean / 2, "p95": 2 * mean, "p99": 3 * mean},
        "tpot": {"mean": 0.01},
        "kv_hits": {"device": 0.4, "host": 0.2},
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sweep.Sweep:
    dropped: list[str] = []
    ground: Any = SimpleNamespace(
        budget=BUDGET,
        link_gbps=0.05,
        make=lambda name, setting=None: systems.make(name, setting, BUDGET, tmp_path, 0.05),
        fleet=SimpleNamespace(drop=dropped.extend),
    )

    def measured(self: sweep.Sweep, system: systems.System, rate: float, seed: int) -> dict[str, Any]:
        worse = 1.0 if system.setting in (None, 2) else 2.0
        return figures(SLOW[system.name] * worse * rate**2)

    monkeypatch.setattr(sweep.Sweep, "figures", measured)
    return sweep.Sweep(ground, list(SLOW), "chat", 30.0, 2, 0.5, 1)


def test_settings_are_tuned_and_peaks_bracketed(run: sweep.Sweep) -> None:
    run.tune(1.0)
    assert {name: one.setting for name, one in run.chosen.items()} == {
        "stock": 2,
        "hicache": 2,
        "elora": None,
    }
    peaks = run.peaks(1.0)
    for name, slow in SLOW.items():
        top = (0.5 / slow) ** 0.5
        found = peaks[name]
        assert found.failed is not None and found.rate <= top < found.failed <= found.rate * 1.11


def test_all_play_all_rates_in_rotating_order(run: sweep.Sweep) -> None:
    run.tune(1.0)
    cells = run.cells([1.0, 2.0])
    order = [cell["name"] for cell in cells]
    assert order[:3] == ["stock", "hicache", "elora"] and order[6:9] == ["hicache", "elora", "stock"]
    rows = sweep.rows(cells)
    assert len(rows) == 6 and all(len(row) == len(sweep.HEADER) for row in rows)
    assert rows[0][:4] == ["stock", "1.00", "100", "200"] and rows[-1][3] == "200"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--workload", "agents"], "add --rates LIST or --peak"),
        (["--rates", "1,0"], "--rates takes turns a second above 0"),
        (["--rates", "1", "--compare", "stock,fast"], "'fast' is not one of"),
    ],
)
def test_what_cannot_be_played_is_one_line(argv: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match="live: ") as failure:
        main(["live", *argv])
    assert words in str(failure.value) and "\n" not in str(failure.value)
