"""Systems side by side on chat that is as much as each baseline can bear: tuning, capacity, repeats, ablations."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
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

    def _key(self, *parts: object) -> tuple[object, ...]:
        s, budget = self.settings, self.rig.budget
        memory = f"{budget.device_tokens}/{budget.host_tokens}/{budget.running}/{self.rig.link_gbps:.4f}"
        return (*parts, f"{memory}/{s.seed}/{s.warmup}/{'+'.join(map(str, budget.ranks))}")

    def _start_missing(self, keys: dict[str, list[tuple[object, ...]]], group: list[launch.System]) -> None:
        """Start, at the same time, the servers of the group that have a cell to measure."""
        have = self.rig.state.has
        self.rig.want([one for one in group if not all(have(*key) for key in keys[one.key])])

    def tune(self, factor: float) -> dict[str, launch.System]:
        """The best setting of every system that has one, for this working set, on a seed that is reported nowhere.

        Baselines whose capacity loads are shares of are tuned at a share of their own, the others at the last one's.
        """
        s, top = self.settings, 0.0
        chosen: dict[str, launch.System] = {}
        for name in sorted(s.names, key=lambda name: name not in BASES):
            candidates = self.rig.candidates(name, quick=s.quick)
            if name == "stock-overlap":  # the same buffers, filled in another way
                candidates = [self.rig.system(name, chosen["stock"].setting)]
            if name in BASES:
                self._start_missing(
                    {c.key: [self._capacity_key(c, factor, "tuning")] for c in candidates}, candidates
                )
                top = self._capacity(candidates[0], factor, "tuning")
            chosen[name] = self._choose(candidates, TUNING_LOAD * top, factor)
            if name in BASES:
                # The quick run takes what it knows already; the other seeds of the full one may differ a little.
                known = s.quick and chosen[name] is candidates[0]
                seed = "tuning" if known else "capacity"
                self.capacities[f"{factor:g}x {name}"] = self._capacity(chosen[name], factor, seed)
        return chosen

    def _capacity_key(self, system: launch.System, factor: float, seed: str) -> tuple[object, ...]:
        return self._key("capacity", system.key, seed, factor)

    def _capacity(self, system: launch.System, factor: float, seed: str) -> float:
        """Turns a second, with this working set, when every live session sends its next turn at once.

        Not the answers of a fixed time: a server that lets the sessions of few adapters go round and round, while the
        others wait, would seem to do twice of what it can.
        """

        def measure() -> dict[str, Any]:
            live, lanes = self.rig.server(system), self.lanes(seed, factor)
            names = model.names(self.rig.budget.adapters)
            with live.awake():
                live.flush()
                answers, seconds = player.burst(
                    live.url, lanes, names, vocab=self.rig.vocab, turns=CAPACITY_TURNS
                )
            found = {"capacity": len(answers) / seconds, "turns": len(answers), "seconds": seconds}
            progress(f"{system.key} answers {found['capacity']:.2f} turns a second at most")
            return found

        return float(self.rig.state.cell(self._capacity_key(system, factor, seed), measure)["capacity"])

    def _choose(self, candidates: list[launch.System], rate: float, factor: float) -> launch.System:
        steps = [player.Step(rate, self.settings.tuning_seconds)]
        keys = {
            one.key: self._key("tune", one.key, factor, steps[0].seconds, f"{rate:.4f}") for one in candidates
        }
        if len(candidates) > 1:
            self._start_missing({name: [key] for name, key in keys.items()}, candidates)

        def mean_ttft(one: launch.System) -> float:
            (cell,) = self._cells(keys[one.key], one, self.lanes("tuning", factor), steps)
            mean = float(cell["summary"]["ttft_mean"])
            entry = {"system": one.name, "factor": factor, "setting": one.setting, "ttft_mean": mean}
            kept = {key: value for key, value in cell["summary"].items() if key == "invalid_kv"}
            self.tuning.append(entry | kept)
            progress(f"tuning: {one.key} mean TTFT {1000 * mean:.0f} ms")
            return mean

        return self.rig.best(candidates, mean_ttft)

    def _cells(
        self, key: Sequence[object], system: launch.System, lanes: player.Lanes, steps: list[player.Step]
    ) -> list[dict[str, Any]]:
        settle = QUICK_SETTLE_S if self.settings.quick else SETTLE_S
        measure = partial(self.rig.measure, system, lanes, steps, spread=self.spread(lanes), settle=settle)
        found: list[dict[str, Any]] = self.rig.state.cell(key, measure)
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
        labels = {one.key: one.name for one in group} | ({group[0].key: beside} if beside else {})
        # Systems without a host tier would only drown in what one with it can do.
        mine = {
            one.key: [load for load in loads if load.of == "stock" or one.name not in HOSTLESS]
            for one in group
        }
        steps = {name: [player.Step(load.rate, s.seconds) for load in of] for name, of in mine.items()}
        keys = {
            one.key: [
                self._key(
                    "cell", beside, one.key, factor, "+".join(f"{step.rate:.4f}" for step in steps[one.key]),
                    repeat, s.seconds,
                )
                for repeat in range(s.repeats)
            ]
            for one in group
        }  # fmt: skip
        self._start_missing(keys, group)
        for repeat in range(s.repeats):
            lanes = self.lanes(str(repeat), factor)
            for one in rotated(group, repeat):
                cells = self._cells(keys[one.key][repeat], one, lanes, steps[one.key])
                for cell, load in zip(cells, mine[one.key], strict=True):
                    place = {"factor": factor, "load": load.share, "of": load.of}
                    found.append(cell | {"name": labels[one.key], "repeat": repeat} | place)
                    mean = 1000 * cell["summary"]["ttft_mean"]
                    progress(
                        f"{factor:g}x, repeat {repeat + 1}/{s.repeats}: {labels[one.key]} at {load.rate:.2f}/s: "
                        f"mean TTFT {mean:.0f} ms"
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
