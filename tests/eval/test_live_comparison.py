"""Tuning, loads, repeats and ablations of a live comparison, on invented figures; no server is started."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from elora_sglang.eval.serving import launch, player, report
from elora_sglang.eval.serving.comparison import Comparison, Settings
from elora_sglang.eval.serving.rig import Rig
from elora_sglang.integration.plugin.config import TERMS

NAMES = ("stock", "stock-overlap", "hicache", "static", "elora")
#: Mean TTFT in seconds.
MEANS = {"stock": 1.0, "stock-overlap": 0.8, "hicache": 0.5, "static": 0.4}
#: Turns a second that a system can do, and its second-best setting.
TOPS = {"stock": 2.0, "hicache": 4.0}


class InventedRig(Rig):
    """Servers are only named."""

    measured: list[tuple[str, list[player.Step]]]

    def want(self, systems: Sequence[launch.System]) -> None:
        """Nothing is started."""

    def measure(
        self, system: launch.System, lanes: player.Lanes, steps: Sequence[player.Step], **options: Any
    ) -> list[dict[str, Any]]:
        self.measured.append((system.key, list(steps)))
        mean = MEANS.get(system.name, 0.3) * (1.0 if system.setting in (None, 2, 0.35) else 2.0)
        quantiles = dict.fromkeys(
            ("ttft_p50", "ttft_p95", "ttft_p99", "tpot_mean", "hit_device", "hit_host"), 0.5
        )
        invalid = {} if system.name in launch.STOCK else {"invalid_kv": 0.0}
        return [
            {
                "system": system.key, "rate_asked": step.rate, "counters": {}, "ttft": [mean],
                "answers": {"0/0/0": [1]},
                "summary": {"ttft_mean": mean, "rate": step.rate, "requests": 9} | quantiles | invalid,
            }
            for step in steps
        ]  # fmt: skip


class InventedComparison(Comparison):
    """So are capacities."""

    def _capacity(
        self, one: launch.System, factor: float, seed: str, group: Sequence[launch.System] = ()
    ) -> float:
        return TOPS[one.name]


@pytest.fixture
def comparison(tmp_path: Path) -> InventedComparison:
    args = Namespace(
        device_tokens=None, host_tokens=None, running=8, adapters=None, state=tmp_path, model=None,
        profile="h200-llama-8b", link_gbps="0.05",
    )  # fmt: skip
    rig = InventedRig(args, 16_384, adapters=12)
    rig.measured = []
    settings = Settings(NAMES, (2.0,), (0.5, 0.8), 2, None, 5.0, 3.0, 1, quick=False, ablate=True)
    return InventedComparison(settings, rig)


def test_settings_are_tuned_at_a_share_of_the_baselines_own_capacity(comparison: InventedComparison) -> None:
    chosen = {name: one.setting for name, one in comparison.tune(2.0).items()}
    assert chosen == {"stock": 2, "stock-overlap": 2, "hicache": 2, "static": 0.35, "elora": None}
    rig = comparison.rig
    assert isinstance(rig, InventedRig)
    rates = {key.partition("@")[0]: steps[0].rate for key, steps in rig.measured}
    assert rates == pytest.approx({"stock": 0.7 * 2, "hicache": 0.7 * 4, "static": 0.7 * 4})
    assert {entry["system"] for entry in comparison.tuning} == {"stock", "hicache", "static"}


def test_all_are_measured_in_rotating_order_and_only_at_loads_that_they_can_bear(
    comparison: InventedComparison,
) -> None:
    data = comparison.run()
    first, second = ([c["name"] for c in data["cells"] if c["repeat"] == repeat] for repeat in (0, 1))
    assert list(dict.fromkeys(first)) == list(NAMES)
    assert list(dict.fromkeys(second)) == [*NAMES[1:], NAMES[0]]
    places = {(cell["name"], cell["of"], cell["load"]) for cell in data["cells"]}
    assert {place[1:] for place in places if place[0] == "elora"} == {
        ("stock", 0.5), ("stock", 0.8), ("hicache", 0.5), ("hicache", 0.8)
    }  # fmt: skip
    assert {place[1] for place in places if place[0] in ("stock", "stock-overlap")} == {"stock"}
    for cell in data["cells"]:
        assert cell["rate_asked"] == pytest.approx(cell["load"] * TOPS[cell["of"]])
    aims = {aim.name: aim.value for aim in report.aims(data)}
    assert aims["2x, 0.8 of stock: mean TTFT of elora over the best stock"] == pytest.approx(0.3 / 0.8)


def test_every_part_is_left_out_once_beside_the_whole(comparison: InventedComparison) -> None:
    names = [cell["name"] for cell in comparison.run()["ablations"]]
    assert {name for name in names if "without" in name} == {f"elora-without-{term}" for term in TERMS}
    groups = -(-len(TERMS) // 4)
    assert {name for name in names if "without" not in name} == {f"elora#{4 * i}" for i in range(groups)}
    assert len(names) == 2 * (len(TERMS) + groups)


def test_a_second_run_measures_nothing(comparison: InventedComparison) -> None:
    first = comparison.run()
    rig = comparison.rig
    assert isinstance(rig, InventedRig) and rig.measured
    rig.measured.clear()
    again = InventedComparison(comparison.settings, rig).run()
    assert not rig.measured and again["cells"] == first["cells"] and again["tuning"] == first["tuning"]
