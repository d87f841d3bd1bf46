"""Live servers over rates of one of the paper's workloads: curves, and the peak load at a TTFT limit by bisection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tqdm import tqdm

from elora_sglang.eval.serving import player, scaled, systems
from elora_sglang.eval.serving.ground import Ground
from elora_sglang.eval.sim import peak
from elora_sglang.eval.support import reporting
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
class Sweep:
    """Every server plays the same seeded sessions, one server at a time, the others stopped.

    Attributes:
        ground: prepared by the caller.
        names: systems.
        workload: of :mod:`.scaled`.
        seconds: of a run, warm-up included.
        repeats: seeds of each rate.
        limit_s: mean TTFT at the peak.
        seed: of the first repeat.
    """

    ground: Ground
    names: Sequence[str]
    workload: str
    seconds: float
    repeats: int
    limit_s: float
    seed: int
    chosen: dict[str, systems.System] = field(default_factory=dict)

    def figures(self, system: systems.System, rate: float, seed: int) -> dict[str, Any]:
        """Of one run, from disk or measured now."""
        key = ("sweep", system.key, self.workload, f"{rate:.4f}", self.seconds, seed, self._digest())
        found: dict[str, Any] = self.ground.state.cell(key, lambda: self._measure(system, rate, seed))
        return found

    def _digest(self) -> str:
        budget = self.ground.budget
        return f"{budget.device_tokens}/{budget.host_tokens}/{budget.adapters}/{self.ground.link_gbps:.4f}"

    def _measure(self, system: systems.System, rate: float, seed: int) -> dict[str, Any]:
        budget = self.ground.budget
        whole = scaled.workload(
            self.workload,
            rate=rate,
            duration_s=BEFORE_S + self.seconds,
            adapters=budget.adapters,
            ranks=budget.ranks,
            seed=seed,
        )
        work = transforms.since(whole, BEFORE_S)
        turns = round(rate * self.seconds)
        running = self.ground.running(system)
        running.go()
        try:
            running.flush()
            with tqdm(total=turns, unit="turn", desc=f"{system.key} at {rate:.2f}/s", leave=False) as bar:
                records = player.play(
                    running.live.url,
                    work,
                    scaled.adapter_names(budget.adapters),
                    vocab=self.ground.vocab,
                    told=lambda answered: bar.update(),
                    until_s=self.seconds,
                )
        finally:
            running.halt()
        return player.summary(records, player.sent(records), WARMUP * self.seconds)

    def tune(self, rate: float) -> None:
        """The best setting of each system that has one, on the training seed; the others are ended."""
        for name in self.names:
            settings: tuple[float | None, ...] = systems.sweep(name, self.ground.budget, quick=True) or (
                None,
            )
            candidates = [self.ground.make(name, setting) for setting in settings]
            times = [
                self.figures(one, rate, TRAINING)["ttft"]["mean"] if len(candidates) > 1 else 0.0
                for one in candidates
            ]
            self.chosen[name] = candidates[times.index(min(times))]
            self.ground.fleet.drop([one.key for one in candidates if one is not self.chosen[name]])
            reporting.progress(f"{self.workload}: {self.chosen[name].key}")

    def cells(self, rates: Sequence[float]) -> list[dict[str, Any]]:
        """All systems at all rates, in rotating order."""
        found = []
        for repeat in range(self.repeats):
            for rate in rates:
                order = [*self.names[repeat % len(self.names) :], *self.names[: repeat % len(self.names)]]
                for name in order:
                    figures = self.figures(self.chosen[name], rate, self.seed + repeat)
                    reporting.progress(
                        f"{name} at {rate:.2f}/s, repeat {repeat + 1}/{self.repeats}: mean TTFT "
                        f"{1000 * figures['ttft']['mean']:.0f} ms"
                    )
                    summary = figures | {"ttft_mean": figures["ttft"]["mean"]}
                    found.append({"name": name, "rate_asked": rate, "repeat": repeat, "summary": summary})
        return found

    def _training_ttft(self, system: systems.System, rate: float) -> float:
        return float(self.figures(system, rate, TRAINING)["ttft"]["mean"])

    def peaks(self, start: float) -> dict[str, peak.Peak]:
        """Turns a second that each system answers with a mean TTFT of ``limit_s``, on the training seed."""
        found: dict[str, peak.Peak] = {}
        for name in self.names:
            found[name] = peak.find(
                partial(self._training_ttft, self.chosen[name]),
                start,
                limit_s=self.limit_s,
                precise=PRECISE,
                least=0.05,
                most=200.0,
            )
            reporting.progress(f"{name}: peak {found[name].rate:.2f} turns a second")
        return found


def rows(cells: Sequence[dict[str, Any]]) -> list[list[object]]:
    """One a system and rate, means over repeats, under :data:`HEADER`."""
    places = dict.fromkeys((cell["rate_asked"], cell["name"]) for cell in cells)
    table: list[list[object]] = []
    for rate, name in places:
        mine = [c["summary"] for c in cells if (c["rate_asked"], c["name"]) == (rate, name)]

        def mean(pick: Any, mine: list[dict[str, Any]] = mine) -> float:
            return float(sum(pick(one) for one in mine) / len(mine))

        table.append([
            name, f"{rate:.2f}", f"{mean(lambda s: s['requests']):.0f}",
            *(f"{1000 * mean(lambda s, k=key: s['ttft'][k]):.0f}" for key in ("mean", "p50", "p95", "p99")),
            f"{1000 * mean(lambda s: s['tpot']['mean']):.1f}",
            *(f"{100 * mean(lambda s, t=tier: s['kv_hits'][t]):.0f}" for tier in ("device", "host")),
        ])  # fmt: skip
    return table


HEADER = ("system", "turns/s", "requests", "TTFT ms", "P50", "P95", "P99", "TPOT", "KV dev %", "host %")
