"""Live servers on a workload as it arrives: figures at each rate, and the peak rate at a TTFT limit by bisection."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from elora_sglang.eval.serving import launch, player
from elora_sglang.eval.serving.comparison import rotated
from elora_sglang.eval.serving.rig import Rig
from elora_sglang.eval.sim import peak
from elora_sglang.eval.support.reporting import progress
from elora_sglang.eval.workloads import transforms

#: Seconds before a run in which its sessions under way began.
BEFORE_S = 30.0
#: Share of a run's time that is warm-up.
WARMUP = 0.3
#: Seeds beside the reported ones: of tuning and of the search for peaks.
TRAINING = 1000
#: A search ends within this factor.
PRECISE = 0.1


@dataclass
class Rates:
    """Every server plays the same seeded sessions, one server at a time, the others stopped.

    Attributes:
        rig: entered.
        names: systems.
        workload: its name.
        seconds: of a run, warm-up included.
        repeats: seeds of each rate.
        limit_s: mean TTFT at the peak.
        seed: of the first repeat.
    """

    rig: Rig
    names: Sequence[str]
    workload: str
    seconds: float
    repeats: int
    limit_s: float
    seed: int
    chosen: dict[str, launch.System] = field(default_factory=dict)

    def cell(self, system: launch.System, rate: float, seed: int) -> dict[str, Any]:
        """Of one run, from disk or measured now."""
        budget = self.rig.budget
        memory = f"{budget.device_tokens}/{budget.host_tokens}/{budget.adapters}/{self.rig.link_gbps:.4f}"
        key = ("rate", system.key, self.workload, f"{rate:.4f}", self.seconds, seed, memory)
        found: dict[str, Any] = self.rig.state.cell(key, lambda: self._measure(system, rate, seed))
        return found

    def _measure(self, system: launch.System, rate: float, seed: int) -> dict[str, Any]:
        whole = self.rig.workload(self.workload, rate=rate, duration_s=BEFORE_S + self.seconds, seed=seed)
        lanes = player.lanes_of(transforms.since(whole, BEFORE_S))
        step = player.Step(rate, (1 - WARMUP) * self.seconds)
        bar = f"{system.key} at {rate:.2f}/s"
        (cell,) = self.rig.measure(system, lanes, [step], settle=WARMUP * self.seconds, bar=bar)
        return cell

    def _training_ttft(self, system: launch.System, rate: float) -> float:
        return float(self.cell(system, rate, TRAINING)["summary"]["ttft_mean"])

    def tune(self, rate: float) -> None:
        """The best setting of each system that has one, on the training seed; the others are ended."""
        for name in self.names:
            candidates = self.rig.candidates(name, quick=True)
            self.chosen[name] = self.rig.best(candidates, lambda one: self._training_ttft(one, rate))
            progress(f"{self.workload}: {self.chosen[name].key}")

    def cells(self, rates: Sequence[float]) -> list[dict[str, Any]]:
        """All systems at all rates, in rotating order."""
        found = []
        for repeat in range(self.repeats):
            for rate in rates:
                for name in rotated(self.names, repeat):
                    cell = self.cell(self.chosen[name], rate, self.seed + repeat)
                    mean = 1000 * cell["summary"]["ttft_mean"]
                    progress(
                        f"{name} at {rate:.2f}/s, repeat {repeat + 1}/{self.repeats}: mean TTFT {mean:.0f} ms"
                    )
                    found.append(cell | {"name": name, "repeat": repeat})
        return found

    def peaks(self, start: float) -> dict[str, peak.Peak]:
        """Turns a second that each system answers with a mean TTFT of ``limit_s``, on the training seed."""
        found: dict[str, peak.Peak] = {}
        for name, system in self.chosen.items():
            found[name] = peak.find(
                partial(self._training_ttft, system),
                start,
                limit_s=self.limit_s,
                precise=PRECISE,
                least=0.05,
                most=200.0,
            )
            progress(f"{name}: peak {found[name].rate:.2f} turns a second")
        return found


HEADER = ("system", "turns/s", "requests", "TTFT ms", "P50", "P95", "P99", "TPOT", "KV dev %", "host %")
#: Figures of a summary under :data:`HEADER`, and how they are shown.
SHOWN = (
    ("requests", 1, 0), ("ttft_mean", 1e3, 0), ("ttft_p50", 1e3, 0), ("ttft_p95", 1e3, 0), ("ttft_p99", 1e3, 0),
    ("tpot_mean", 1e3, 1), ("hit_device", 100, 0), ("hit_host", 100, 0),
)  # fmt: skip


def rows(cells: Sequence[dict[str, Any]]) -> list[list[object]]:
    """One a system and rate, means over repeats, under :data:`HEADER`."""
    table: list[list[object]] = []
    for rate, name in dict.fromkeys((cell["rate_asked"], cell["name"]) for cell in cells):
        mine = [cell["summary"] for cell in cells if (cell["rate_asked"], cell["name"]) == (rate, name)]
        means = (
            f"{scale * statistics.fmean(one[key] for one in mine):.{digits}f}" for key, scale, digits in SHOWN
        )
        table.append([name, f"{rate:.2f}", *means])
    return table
