"""One scene of the grid: a workload with so many adapters on a machine; peaks, tuned baselines, times at their loads.

Knobs and peaks are found on a training workload, which differs from the reported one in its seed. Every baseline is
compared with ELORA at shares of *its own* peak load, the highest rate with a mean TTFT below 500 ms (the paper's
measure).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from elora_sglang.eval.sim import machine as machines
from elora_sglang.eval.sim import peak, systems
from elora_sglang.eval.sim.run import simulate
from elora_sglang.eval.workloads import create
from elora_sglang.eval.workloads.model import Workload

#: Seeds of the workload that is reported and of the one that knobs and peaks are found on.
REPORTED, TRAINING = 1, 2
#: Turns that are simulated for a reported figure, and for a step of a search. A fifth of the time is warm-up.
REPORTED_TURNS, SEARCH_TURNS, WARMUP = 6500, 1500, 0.2
#: Share of the first peak at which knobs are tuned.
TUNING_LOAD = 0.7
BASELINES = ("vllm", "s-lora", "stock", "hicache")


@dataclass(frozen=True)
class Scene:
    """Names and numbers only, so that it can be a key of a cell on disk.

    Attributes:
        machine, workload: by name.
        adapters, ranks, skew: of the workload; ``ranks`` as its generator takes them.
        extra: further parameters of the generator.
        block_tokens: tokens of a slot.
    """

    machine: str
    workload: str
    adapters: int
    ranks: str = "32,64"
    skew: float = 0.9
    extra: tuple[tuple[str, float], ...] = ()
    block_tokens: int = 64

    def key(self) -> tuple[object, ...]:
        """What makes it different from others."""
        return tuple(asdict(self).values())

    def traffic(self, rate: float, turns: int, seed: int) -> Workload:
        """About ``turns`` turns at ``rate`` turns a second."""
        return create(
            self.workload,
            rate=rate,
            duration_s=turns / rate,
            adapters=self.adapters,
            ranks=self.ranks,
            skew=self.skew,
            seed=seed,
            **dict(self.extra),
        )

    def serve(self, name: str, rate: float, turns: int, seed: int, **knobs: Any) -> dict[str, Any]:
        """Figures of a system at a rate (see :func:`~elora_sglang.eval.sim.results.summarize`)."""
        machine = machines.load(self.machine)
        slot = machine.kv_bytes_per_token * self.block_tokens
        return simulate(
            self.traffic(rate, turns, seed),
            systems.systems()[name],
            machine,
            block_tokens=self.block_tokens,
            device_slots=int(machine.device_bytes // slot),
            host_slots=int(machine.host_bytes // slot),
            warmup_s=WARMUP * turns / rate,
            **knobs,
        ).figures

    def setting(self) -> systems.Setting:
        """What knobs are swept for."""
        machine = machines.load(self.machine)
        slot = machine.kv_bytes_per_token * self.block_tokens
        adapters = {a.name: a.rank for a in self.traffic(1.0, 1, REPORTED).header.adapters}
        sizes = int(machine.device_bytes // slot), int(machine.host_bytes // slot)
        return systems.Setting(machine, self.block_tokens, adapters, *sizes)

    def knobs(self, name: str) -> list[dict[str, Any]]:
        """The values that a system's knob is tuned over; one empty choice where it has none."""
        knob = systems.systems()[name].knob
        if knob is None:
            return [{}]
        values = systems.slot_counts(self.setting()) if knob == "slots" else systems.lora_shares()
        return [{knob: value} for value in values]


def peak_of(scene: Scene, name: str, start: float, **knobs: Any) -> peak.Peak:
    """The peak load of a system on the training workload."""

    def mean_ttft(rate: float) -> float:
        found = scene.serve(name, rate, SEARCH_TURNS, TRAINING, **knobs)
        return float("inf") if found["refused"] else float(found["ttft"]["mean"])

    return peak.find(mean_ttft, start)


def tuned(scene: Scene, name: str, start: float) -> tuple[dict[str, Any], peak.Peak]:
    """The best knobs of a system and its peak load with them."""
    choices = scene.knobs(name)
    middle = choices[len(choices) // 2]
    first = peak_of(scene, name, start, **middle)
    if len(choices) == 1 or not first.rate:
        return middle, first
    times = [
        (scene.serve(name, TUNING_LOAD * first.rate, SEARCH_TURNS, TRAINING, **knobs)["ttft"]["mean"], number)
        for number, knobs in enumerate(choices)
    ]
    best = choices[min(times)[1]]
    return best, first if best == middle else peak_of(scene, name, first.rate, **best)


def measure(
    scene: Scene, *, baselines: Sequence[str] = BASELINES, loads: Sequence[float] = (0.5, 0.7, 0.8)
) -> dict[str, Any]:
    """Peaks of all, and of each baseline and ELORA the figures at ``loads`` of the baseline's peak."""
    start = 4.0
    peaks: dict[str, peak.Peak] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for name in (*baselines, "elora"):
        chosen[name], peaks[name] = tuned(scene, name, start)
        start = peaks[name].rate or start
    cells = []
    for base in baselines:
        for load in loads:
            rate = load * peaks[base].rate
            if not rate:
                continue
            for name in (base, "elora"):
                figures = scene.serve(name, rate, REPORTED_TURNS, REPORTED, **chosen[name])
                cells.append({"of": base, "load": load, "rate": rate, "system": name, "figures": figures})
    return {
        "scene": asdict(scene),
        "peaks": {n: asdict(p) for n, p in peaks.items()},
        "knobs": chosen,
        "cells": cells,
    }
