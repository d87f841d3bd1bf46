"""Rates and peaks of live systems: who is asked what, and what the tables say; no server is started."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from elora_sglang.eval.cli import main
from elora_sglang.eval.serving import launch, rates
from elora_sglang.eval.serving.evaluation_model import RANKS
from elora_sglang.eval.serving.rig import Rig

#: Mean TTFT in seconds at a turn a second; it grows with the square of the rate.
SLOW = {"stock": 0.2, "hicache": 0.1, "elora": 0.05}


def cell(mean: float) -> dict[str, Any]:
    quantiles = {"ttft_mean": mean, "ttft_p50": mean / 2, "ttft_p95": 2 * mean, "ttft_p99": 3 * mean}
    others = {"requests": 100, "tpot_mean": 0.01, "hit_device": 0.4, "hit_host": 0.2}
    return {"summary": quantiles | others}


class InventedRates(rates.Rates):
    """The figures of servers are invented; the rig starts none."""

    def cell(self, system: launch.System, rate: float, seed: int) -> dict[str, Any]:
        worse = 1.0 if system.setting in (None, 2) else 2.0
        return cell(SLOW[system.name] * worse * rate**2) | {"rate_asked": rate}


@pytest.fixture
def run(tmp_path: Path) -> rates.Rates:
    args = Namespace(
        device_tokens=None, host_tokens=None, running=8, adapters=16, state=tmp_path, model=None,
        profile="h200-llama-8b", link_gbps="0.05",
    )  # fmt: skip
    rig = Rig(args, 10240)
    assert rig.budget == launch.Budget(10240, 30720, 8, 16, RANKS)
    return InventedRates(rig, tuple(SLOW), "chat", 30.0, 2, 0.5, 1)


def test_settings_are_tuned_and_peaks_bracketed(run: rates.Rates) -> None:
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


def test_all_play_all_rates_in_rotating_order(run: rates.Rates) -> None:
    run.tune(1.0)
    cells = run.cells([1.0, 2.0])
    order = [cell["name"] for cell in cells]
    assert order[:3] == ["stock", "hicache", "elora"] and order[6:9] == ["hicache", "elora", "stock"]
    rows = rates.rows(cells)
    assert len(rows) == 6 and all(len(row) == len(rates.HEADER) for row in rows)
    assert rows[0][:4] == ["stock", "1.00", "100", "200"] and rows[-1][3] == "200"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--workload", "agents"], "add --rates LIST or --peak"),
        (["--compare", "lru,elora"], "--compare needs stock"),
        (["--rates", "1,0"], "argument --rates: must be above 0"),
        (["--rates", "1", "--compare", "stock,fast"], "there is no fast"),
        (["--rates", "1", "--profile", "no-such"], "no machine profile 'no-such'"),
    ],
)
def test_what_cannot_be_played_is_one_line(argv: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="live: ") as failure:
        main(["live", "--state", str(tmp_path), *argv])
    assert words in str(failure.value) and "\n" not in str(failure.value)
