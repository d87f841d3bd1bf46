"""One comparison from the link to the last cell: tuning, capacity, interleaved repeats, ablations."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from elora_sglang.eval.serving import capacity, chat, drive, model, runner, systems
from elora_sglang.eval.serving.ground import Ground
from elora_sglang.eval.sim.machine import Machine
from elora_sglang.eval.support import reporting
from elora_sglang.eval.support.state import State
from elora_sglang.integration.plugin.config import TERMS

TUNING_LOAD = 0.7
#: Share of the machine that the histories of the sessions alive at the start take while they come in.
COLD_LOAD = 0.75
ABLATION_LOAD = 0.8
#: Systems whose own capacity loads are shares of; and those that are not measured at a stronger one's.
BASES, HOSTLESS = ("stock", "hicache"), ("stock", "stock-overlap")
ABLATIONS_AT_ONCE = 4


@dataclass(frozen=True)
class Settings:
    """What one comparison measures. Tokens are KV tokens; seconds per cell."""

    names: tuple[str, ...]
    folder: Path
    state: Path
    device_tokens: int
    host_tokens: int
    running: int
    factors: tuple[float, ...]
    loads: tuple[float, ...]
    repeats: int
    warmup: float | None
    seconds: float
    tuning_seconds: float
    seed: int
    quick: bool
    ablate: bool
    link: str
    ranks: tuple[int, ...]
    gpu: Machine


@dataclass(frozen=True)
class Load:
    """``share`` of what the tuned system ``of`` can do with a working set: ``rate`` turns a second."""

    of: str
    share: float
    rate: float


@dataclass
class Comparison:
    """Runs what is missing, returns cells."""

    settings: Settings
    state: State = field(init=False)
    ground: Ground = field(init=False)
    chosen: dict[str, dict[str, systems.System]] = field(default_factory=dict)
    capacities: dict[str, float] = field(default_factory=dict)
    tuning: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        s = self.settings
        sizes = [model.adapter_bytes(r) for r in s.ranks]
        self.adapter_tokens = chat.mean_adapter_tokens(sizes, model.KV_BYTES_PER_TOKEN)
        most = max(chat.size(int(factor * s.device_tokens), self.adapter_tokens)[0] for factor in s.factors)
        self.budget = systems.Budget(s.device_tokens, s.host_tokens, s.running, most, s.ranks)
        self.state = State(s.state)
        self.ground = Ground("live", s.folder, self.state, self.budget, s.link, s.gpu)

    @property
    def fleet(self) -> runner.Fleet:
        """The servers."""
        return self.ground.fleet

    def _sweep(self, name: str) -> tuple[float, ...]:
        return systems.sweep(name, self.budget, quick=self.settings.quick)

    def workload(self, seed: str, factor: float) -> chat.Workload:
        """The traffic of a seed for a working set of ``factor`` times the device memory."""
        wanted = int(factor * self.settings.device_tokens)
        return chat.generate(seed, wanted, self.adapter_tokens, vocab=self.ground.vocab)

    def spread(self, work: chat.Workload) -> float:
        """Seconds in which the sessions alive at the start come in, their histories unknown to any cache."""
        cold = len(work.lanes) * work.mean_prompt_tokens * self.ground.prefill_s / COLD_LOAD
        return cold if self.settings.warmup is None else self.settings.warmup

    def tune(self, factor: float) -> dict[str, systems.System]:
        """The best setting of every system that has one, for this working set, on a seed that is reported nowhere.

        Baselines whose capacity loads are shares of are tuned at a share of their own, the others at the last one's.
        """
        s = self.settings
        chosen: dict[str, systems.System] = {}
        for name in sorted(s.names, key=lambda name: name not in BASES):
            sweep: tuple[float | None, ...] = self._sweep(name) or (None,)
            if name == "stock-overlap":
                sweep = (chosen["stock"].setting,)  # the same buffers, filled in another way
            candidates = [self.ground.make(name, setting) for setting in sweep]
            if name in BASES:
                if not self.state.has(*self._capacity_key(candidates[0], factor, "tuning")):
                    self.fleet.want(candidates)
                top = self._capacity(candidates[0], factor, "tuning")
            chosen[name] = self._choose(name, candidates, TUNING_LOAD * top, factor)
            if name in BASES:
                # The quick run takes what it knows already; the other seeds of the full one may differ a little.
                known = s.quick and chosen[name] is candidates[0]
                seed = "tuning" if known else "capacity"
                self.capacities[f"{factor:g}x {name}"] = self._capacity(chosen[name], factor, seed)
        return chosen

    def _capacity_key(self, system: systems.System, factor: float, seed: str) -> tuple[object, ...]:
        return ("capacity", system.key, seed, factor, self._digest())

    def _capacity(self, system: systems.System, factor: float, seed: str) -> float:
        """Turns a second that a system can do with this working set."""

        def measure() -> dict[str, Any]:
            self.fleet.want([system])
            work = self.workload(f"{self.settings.seed}/{seed}", factor)
            server = self.fleet.servers[system.key]
            found = capacity.capacity(server, work, seed=seed, vocab=self.ground.vocab)
            reporting.progress(f"{system.key} answers {found['capacity']:.2f} turns a second at most")
            return found

        return float(self.state.cell(self._capacity_key(system, factor, seed), measure)["capacity"])

    def _tune_key(self, system: systems.System, factor: float, rate: float) -> tuple[object, ...]:
        return ("tune", system.key, factor, self.settings.tuning_seconds, f"{rate:.4f}", self._digest())

    def _digest(self) -> str:
        s = self.settings
        ranks = "+".join(map(str, s.ranks))
        return f"{s.device_tokens}/{s.host_tokens}/{s.running}/{self.ground.link_gbps:.4f}/{s.seed}/{s.warmup}/{ranks}"

    def _choose(
        self, name: str, candidates: Sequence[systems.System], rate: float, factor: float
    ) -> systems.System:
        if len(candidates) == 1:
            return candidates[0]
        s = self.settings
        keys = [self._tune_key(candidate, factor, rate) for candidate in candidates]
        self.fleet.want([c for c, key in zip(candidates, keys, strict=True) if not self.state.has(*key)])
        work = self.workload(f"{s.seed}/tuning", factor)
        best: tuple[float, systems.System] | None = None
        for candidate, key in zip(candidates, keys, strict=True):
            steps = [drive.Step(rate, s.tuning_seconds)]
            (cell,) = self.state.cell(key, partial(self._measure, candidate, work, steps, "tuning", 0))
            mean = cell["summary"]["ttft_mean"]
            entry = {"system": name, "factor": factor, "setting": candidate.setting, "ttft_mean": mean}
            if "invalid_kv" in cell["summary"]:
                entry["invalid_kv"] = cell["summary"]["invalid_kv"]
            self.tuning.append(entry)
            reporting.progress(f"tuning: {candidate.key} mean TTFT {1000 * mean:.0f} ms")
            if best is None or mean < best[0]:
                best = (mean, candidate)
        assert best is not None
        self.fleet.drop([c.key for c in candidates if c.key != best[1].key])
        return best[1]

    def _measure(
        self, system: systems.System, work: chat.Workload, steps: list[drive.Step], seed: str, repeat: int
    ) -> list[dict[str, Any]]:
        self.fleet.want([system])
        return runner.measure(
            self.fleet.servers[system.key],
            work,
            steps=steps,
            spread=self.spread(work),
            seed=seed,
            vocab=self.ground.vocab,
            repeat=repeat,
            settle=runner.QUICK_SETTLE if self.settings.quick else runner.SETTLE,
        )

    def loads(self, factor: float, shares: Sequence[float]) -> list[Load]:
        """The loads of this working set, the lightest first."""
        tops = {of: self.capacities[f"{factor:g}x {of}"] for of in BASES if of in self.settings.names}
        found = [Load(of, share, share * top) for of, top in tops.items() for share in shares]
        return sorted(found, key=lambda load: load.rate)

    def cells(self) -> list[dict[str, Any]]:
        """Every cell: by working set, repeat and system, in rotating order, all loads after one warm-up."""
        found = []
        for factor in self.settings.factors:
            chosen = self.chosen[f"{factor:g}x"] = self.tune(factor)
            group = [chosen[name] for name in self.settings.names]
            self.fleet.keep([system.key for system in group])
            found += self._grid(group, factor, self.loads(factor, self.settings.loads), {})
        return found

    def _grid(
        self, group: Sequence[systems.System], factor: float, loads: Sequence[Load], labels: dict[str, str]
    ) -> list[dict[str, Any]]:
        s, found = self.settings, []

        def mine(system: systems.System) -> list[Load]:
            # Systems without a host tier would only drown in what one with it can do.
            return [load for load in loads if load.of == "stock" or system.name not in HOSTLESS]

        def key(system: systems.System, repeat: int) -> tuple[object, ...]:
            rates = "+".join(f"{load.rate:.4f}" for load in mine(system))
            named = (labels.get(system.key, ""), system.key, factor, rates)
            return ("cell", *named, repeat, s.seconds, self._digest())

        self.fleet.want(
            [m for m in group if not all(self.state.has(*key(m, repeat)) for repeat in range(s.repeats))]
        )
        for repeat in range(s.repeats):
            seed = f"{s.seed}/{repeat}"
            work = self.workload(seed, factor)
            for system in (*group[repeat % len(group) :], *group[: repeat % len(group)]):
                label = labels.get(system.key) or system.name
                steps = [drive.Step(load.rate, s.seconds) for load in mine(system)]
                cells = self.state.cell(
                    key(system, repeat), partial(self._measure, system, work, steps, seed, repeat)
                )
                found += [
                    cell | {"name": label, "factor": factor, "load": load.share, "of": load.of}
                    for cell, load in zip(cells, mine(system), strict=True)
                ]
                means = ", ".join(
                    f"{1000 * cell['summary']['ttft_mean']:.0f} at {step.rate:.2f}/s"
                    for cell, step in zip(cells, steps, strict=True)
                )
                reporting.progress(
                    f"{factor:g}x, repeat {repeat + 1}/{s.repeats}: {label} mean TTFT ms: {means}"
                )
        return found

    def ablations(self) -> list[dict[str, Any]]:
        """``elora`` without one part at a time, beside plain ``elora``, a few servers at a time."""
        factor = self.settings.factors[-1]
        loads = self.loads(factor, (ABLATION_LOAD,))[-1:]
        terms, found = list(TERMS), []
        plain = self.ground.make("elora")
        self.fleet.keep([plain.key])
        for start in range(0, len(terms), ABLATIONS_AT_ONCE):
            group, labels = [plain], {plain.key: f"elora#{start}"}
            for term in terms[start : start + ABLATIONS_AT_ONCE]:
                made = self.ground.make("elora", None, [term])
                made = systems.System(f"elora-without-{term}", None, made.flags)
                group.append(made)
                labels[made.key] = made.name
            found += self._grid(group, factor, loads, labels)
            self.fleet.drop([system.key for system in group[1:]])
        return found

    def run(self) -> dict[str, Any]:
        """Everything; servers are ended whatever happens."""
        self.ground.prepare()
        try:
            cells = self.cells()
            ablations = self.ablations() if self.settings.ablate else []
        finally:
            self.fleet.end()
        return {
            "cells": cells,
            "ablations": ablations,
            "tuning": self.tuning,
            "chosen": {
                factor: {
                    name: system.setting for name, system in chosen.items() if system.setting is not None
                }
                for factor, chosen in self.chosen.items()
            },
            "capacities": self.capacities,
            "link_gbps": self.ground.link_gbps,
            "prefill_s_per_token": self.ground.prefill_s,
            "profile": asdict(self.settings.gpu),
            "budget": asdict(self.budget),
            "settings": {
                key: getattr(self.settings, key)
                for key in (
                    "factors",
                    "loads",
                    "repeats",
                    "warmup",
                    "seconds",
                    "tuning_seconds",
                    "seed",
                    "quick",
                )
            },
        }


def mean_of(cells: Sequence[dict[str, Any]], key: str) -> float:
    """Mean of a figure over repeats."""
    return statistics.fmean(float(cell["summary"][key]) for cell in cells)
