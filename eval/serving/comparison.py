"""Systems side by side on chat that is as much as each baseline can bear: tuning, capacity, repeats, ablations."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from elora_sglang.eval.serving import chat, launch, player
from elora_sglang.eval.serving import evaluation_model as model
from elora_sglang.eval.serving.rig import Rig
from elora_sglang.eval.support.reporting import progress
from elora_sglang.eval.workloads.model import tokens
from elora_sglang.integration.plugin.config import TERMS

TUNING_LOAD = 0.7
#: Share of the machine that the histories of the sessions alive at the start take while they come in.
COLD_LOAD = 0.75
ABLATION_LOAD = 0.8
#: Systems whose own capacity loads are shares of; and those that are not measured at a stronger one's.
BASES, HOSTLESS = ("stock", "hicache"), ("stock", "stock-overlap")
ABLATIONS_AT_ONCE = 4
#: Turns of every live session in a measurement of capacity.
CAPACITY_TURNS = 2
SETTLE_S, QUICK_SETTLE_S = 3.0, 1.5  # seconds after a change of the rate that are not measured


@dataclass(frozen=True)
class Settings:
    """What one comparison measures.

    Attributes:
        names: systems.
        factors: working sets over the device memory.
        loads: shares of a baseline's own capacity.
        repeats: seeds.
        warmup: seconds in which the live sessions come in; None: as prefilling their histories takes.
        seconds, tuning_seconds: of a cell.
        seed: of all.
        quick: fewer settings are tried.
        ablate: whether ``elora`` without each of its parts is measured, too.
    """

    names: tuple[str, ...]
    factors: tuple[float, ...]
    loads: tuple[float, ...]
    repeats: int
    warmup: float | None
    seconds: float
    tuning_seconds: float
    seed: int
    quick: bool
    ablate: bool


def adapter_tokens(ranks: Sequence[int]) -> float:
    """KV tokens that weigh as much as a mean adapter of these LoRA ranks."""
    return statistics.fmean(model.adapter_bytes(rank) for rank in ranks) / model.KV_BYTES_PER_TOKEN


@dataclass(frozen=True)
class Load:
    """``share`` of what the tuned system ``of`` can do with a working set: ``rate`` turns a second."""

    of: str
    share: float
    rate: float


@dataclass
class Comparison:
    """Runs what is missing, returns cells. ``rig``: entered."""

    settings: Settings
    rig: Rig
    chosen: dict[str, dict[str, launch.System]] = field(default_factory=dict)
    capacities: dict[str, float] = field(default_factory=dict)
    tuning: list[dict[str, Any]] = field(default_factory=list)

    def lanes(self, seed: str, factor: float) -> player.Lanes:
        """The traffic of a seed for a working set of ``factor`` times the device memory."""
        wanted = int(factor * self.rig.budget.device_tokens)
        return chat.generate(f"{self.settings.seed}/{seed}", wanted, adapter_tokens(self.rig.budget.ranks))

    def spread(self, lanes: player.Lanes) -> float:
        """Seconds in which the sessions alive at the start come in, their histories unknown to any cache."""
        cold = sum(tokens(lane[0].turns[0].new) for lane in lanes) * self.rig.prefill_s / COLD_LOAD
        return cold if self.settings.warmup is None else self.settings.warmup

    def tune(self, factor: float) -> dict[str, launch.System]:
        """The best setting of every system that has one, for this working set, on a seed that is reported nowhere.

        Baselines whose capacity loads are shares of are tuned at a share of their own, the others at the last one's.
        """
        s, top = self.settings, 0.0
        chosen: dict[str, launch.System] = {}
        for name in sorted(s.names, key=lambda name: name not in BASES):
            group = self.rig.candidates(name, quick=s.quick)
            if name == "stock-overlap":  # the same buffers, filled in another way
                group = [self.rig.system(name, chosen["stock"].setting)]
            if name in BASES:
                top = self._capacity(group[0], factor, "tuning", group)
            steps = [player.Step(TUNING_LOAD * top, s.tuning_seconds)]
            chosen[name] = self.rig.best(group, partial(self._tuning_ttft, group, factor, steps))
            if name in BASES:
                # The quick run takes what it knows already; the other seeds of the full one may differ a little.
                seed = "tuning" if s.quick and chosen[name] is group[0] else "capacity"
                self.capacities[f"{factor:g}x {name}"] = self._capacity(chosen[name], factor, seed)
        return chosen

    def _tuning_ttft(
        self, group: list[launch.System], factor: float, steps: list[player.Step], one: launch.System
    ) -> float:
        (cell,) = self._cells("tuning", one, group, factor, steps)
        mean = float(cell["summary"]["ttft_mean"])
        kept = {key: value for key, value in cell["summary"].items() if key in ("ttft_mean", "invalid_kv")}
        self.tuning.append({"system": one.name, "factor": factor, "setting": one.setting} | kept)
        progress(f"tuning: {one.key} mean TTFT {1000 * mean:.0f} ms")
        return mean

    def _kept(self, measure: Callable[[], Any], group: Sequence[launch.System], *key: object) -> Any:
        """A cell from disk, or measured now, with all servers of the group started."""

        def measured() -> Any:
            self.rig.want(group)
            return measure()

        s, budget = self.settings, self.rig.budget
        memory = f"{budget.device_tokens}/{budget.host_tokens}/{budget.running}/{self.rig.link_gbps:.4f}"
        ranks = "+".join(map(str, budget.ranks))
        return self.rig.state.cell((*key, f"{memory}/{s.seed}/{s.warmup}/{ranks}"), measured)

    def _capacity(
        self, one: launch.System, factor: float, seed: str, group: Sequence[launch.System] = ()
    ) -> float:
        """Turns a second, with this working set, when every live session sends its next turn at once.

        Not the answers of a fixed time: a server that lets the sessions of few adapters go round and round, while the
        others wait, would seem to do twice of what it can.
        """

        def measure() -> dict[str, Any]:
            live, lanes = self.rig.server(one), self.lanes(seed, factor)
            names = model.names(self.rig.budget.adapters)
            with live.awake():
                live.flush()
                answers, seconds = player.burst(
                    live.url, lanes, names, vocab=self.rig.vocab, turns=CAPACITY_TURNS
                )
            progress(f"{one.key} answers {len(answers) / seconds:.2f} turns a second at most")
            return {"capacity": len(answers) / seconds, "turns": len(answers), "seconds": seconds}

        return float(self._kept(measure, group, "capacity", one.key, seed, factor)["capacity"])

    def _cells(
        self, seed: str, one: launch.System, group: Sequence[launch.System], factor: float, steps: list[player.Step],
        label: str = "",
    ) -> list[dict[str, Any]]:  # fmt: skip
        """A cell a step of one system on the traffic of a seed."""
        lanes, rates = self.lanes(seed, factor), "+".join(f"{step.rate:.4f}" for step in steps)
        settle = QUICK_SETTLE_S if self.settings.quick else SETTLE_S
        measure = partial(self.rig.measure, one, lanes, steps, spread=self.spread(lanes), settle=settle)
        found: list[dict[str, Any]] = self._kept(
            measure, group, "cell", label, one.key, factor, rates, seed, steps[0].seconds
        )
        return found

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
            self.rig.keep(group)
            found += self._grid(group, factor, self.loads(factor, self.settings.loads))
        return found

    def _grid(
        self, group: list[launch.System], factor: float, loads: Sequence[Load], beside: str = ""
    ) -> list[dict[str, Any]]:
        """``beside``: a label of the group's first, which is measured again in each group of ablations."""
        s, found = self.settings, []
        for repeat in range(s.repeats):
            for one in rotated(group, repeat):
                label = beside if beside and one is group[0] else one.name
                # Systems without a host tier would only drown in what one with it can do.
                mine = [load for load in loads if load.of == "stock" or one.name not in HOSTLESS]
                steps = [player.Step(load.rate, s.seconds) for load in mine]
                cells = self._cells(str(repeat), one, group, factor, steps, label)
                for cell, load in zip(cells, mine, strict=True):
                    place = {"factor": factor, "load": load.share, "of": load.of}
                    found.append(cell | {"name": label, "repeat": repeat} | place)
                    progress(
                        f"{factor:g}x, repeat {repeat + 1}/{s.repeats}: {label} at {load.rate:.2f}/s: mean TTFT "
                        f"{1000 * cell['summary']['ttft_mean']:.0f} ms"
                    )
        return found

    def ablations(self) -> list[dict[str, Any]]:
        """``elora`` without one part at a time, beside plain ``elora``, a few servers at a time."""
        factor = self.settings.factors[-1]
        loads = self.loads(factor, (ABLATION_LOAD,))[-1:]
        terms, found = list(TERMS), []
        plain = self.rig.system("elora")
        for start in range(0, len(terms), ABLATIONS_AT_ONCE):
            self.rig.keep([plain])
            some = terms[start : start + ABLATIONS_AT_ONCE]
            group = [plain, *(self.rig.system("elora", None, [term]) for term in some)]
            found += self._grid(group, factor, loads, f"elora#{start}")
        return found

    def run(self) -> dict[str, Any]:
        """Everything."""
        cells = self.cells()
        return {
            "cells": cells,
            "ablations": self.ablations() if self.settings.ablate else [],
            "tuning": self.tuning,
            "chosen": {
                factor: {
                    name: system.setting for name, system in chosen.items() if system.setting is not None
                }
                for factor, chosen in self.chosen.items()
            },
            "capacities": self.capacities,
            "settings": asdict(self.settings),
            **self.rig.about(),
        }


def rotated(group: Sequence[Any], repeat: int) -> list[Any]:
    """Who is measured first changes with the repeat."""
    first = repeat % len(group)
    return [*group[first:], *group[:first]]
