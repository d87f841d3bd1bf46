"""One scene of the grid: a workload with so many adapters on a machine; peaks, tuned baselines, times at their loads.

Knobs and peaks are found on a training workload, which differs from the reported one in its seed. Every baseline is
compared with ELORA at shares of *its own* peak load, the highest rate with a mean TTFT below 500 ms (the paper's
measure). A run begins with the sessions that are under way at its rate, and what came before they had time to come
back is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from elora_sglang.eval.sim import machine as machines
from elora_sglang.eval.sim import peak, systems
from elora_sglang.eval.sim.cache import Setting
from elora_sglang.eval.sim.limit import Limit, OverLimitError
from elora_sglang.eval.sim.run import simulate
from elora_sglang.eval.workloads import create, transforms
from elora_sglang.eval.workloads.model import Workload

#: Seeds of the workload that is reported and of the one that knobs and peaks are found on.
REPORTED, TRAINING = 1, 2
#: Peaks are found within this factor.
PRECISE = 0.08
#: Share of the first peak at which knobs are tuned.
TUNING_LOAD = 0.7
#: ``vllm`` is ``stock`` in this model: buffers of the largest rank, LRU on both, batches wait for loads.
BASELINES = ("vllm", "vllm-split", "s-lora", "hicache")
#: Served at one load of their own only, for what it costs: S-LoRA keeps no KV between turns, so its other loads say the
#: same; the fixed split is there for its peak and its invalid KV.
ONE_LOAD = ("vllm-split", "s-lora")
#: Seconds before a run in which its sessions under way began, and of its warm-up: about twice the mean think time.
SPANS = {"chat": (600.0, 120.0), "translation": (0.0, 60.0), "agents": (300.0, 60.0)}
#: Chat thinks for a minute, not for the 160 s of the generator: the paper says nothing of think times, and with these a
#: run of some thousand turns holds several of them.
THINKING = {"chat": {"think_s": 60.0, "think_most": 600.0}}
#: ELORA with so many times the device memory, so that nothing ever leaves it: what prefill and scheduler alone take.
RESIDENT, PLENTY = "all-resident", 50.0
#: A curve ends where the mean TTFT is longer.
OVERLOADED_S = 10.0
#: Warm-up never takes more turns than this, nor more than are counted; at such rates caches are full long before.
MOST_WARMUP_TURNS = 4000
#: A search for a peak begins with a bracket this wide, where another system's peak says where to look.
STRIDE, NEAR_STRIDE = 2.0, 1.25


@dataclass(frozen=True)
class Turns:
    """Turns that are counted in a reported figure, and in a step of a search."""

    reported: int = 5500
    search: int = 1500


@dataclass(frozen=True)
class Scene:
    """Names and numbers only, so that it can be a key of a cell on disk.

    Attributes:
        machine, workload: by name.
        adapters, ranks, skew: of the workload; ``ranks`` as its generator takes them.
        drift_s: seconds between re-draws of who uses what.
        block_tokens: tokens of a slot.
        memory: device memory for KV and adapters as a share of the profile's: a smaller GPU in the same host.
    """

    machine: str
    workload: str
    adapters: int
    ranks: str = "32,64"
    skew: float = 0.9
    drift_s: float = 600.0
    block_tokens: int = 64
    memory: float = 1.0

    def key(self) -> tuple[object, ...]:
        """What makes it different from others."""
        return tuple(asdict(self).values())

    def warmup_s(self, rate: float, turns: int) -> float:
        """Seconds that are not counted before ``turns`` are."""
        return min(SPANS[self.workload][1], min(MOST_WARMUP_TURNS, turns) / rate)

    def traffic(self, rate: float, turns: int, seed: int) -> Workload:
        """About ``turns`` turns at ``rate`` turns a second, and the warm-up before them."""
        before_s = SPANS[self.workload][0]
        whole = create(
            self.workload,
            rate=rate,
            duration_s=before_s + self.warmup_s(rate, turns) + turns / rate,
            adapters=self.adapters,
            ranks=self.ranks,
            skew=self.skew,
            drift_s=self.drift_s,
            seed=seed,
            **THINKING.get(self.workload, {}),
        )
        return transforms.since(whole, before_s) if before_s else whole

    def serve(
        self, name: str, rate: float, turns: int, seed: int, limit_s: float | None = None, **knobs: Any
    ) -> dict[str, Any]:
        """Figures of a system at a rate (see :func:`~elora_sglang.eval.sim.results.summarize`).

        Raises OverLimitError once the mean TTFT is sure to be above ``limit_s``.
        """
        if name == RESIDENT:
            return replace(self, memory=PLENTY).serve("elora", rate, turns, seed, limit_s)
        machine, (device, host) = self._sizes()
        warmup_s = self.warmup_s(rate, turns)
        limit = None if limit_s is None else Limit(limit_s, warmup_s, turns)
        return simulate(
            self.traffic(rate, turns, seed), systems.systems()[name], machine, block_tokens=self.block_tokens,
            device_slots=device, host_slots=host, warmup_s=warmup_s, until_s=warmup_s + turns / rate, limit=limit,
            **knobs,
        ).figures  # fmt: skip

    def mean_ttft(self, name: str, rate: float, turns: int, limit_s: float, **knobs: Any) -> float:
        """Seconds on the training workload; infinite above ``limit_s``, and where a request was refused."""
        try:
            found = self.serve(name, rate, turns, TRAINING, limit_s, **knobs)
        except OverLimitError:
            return float("inf")
        return float("inf") if found["refused"] else float(found["ttft"]["mean"])

    def _sizes(self) -> tuple[machines.Machine, tuple[int, int]]:
        machine = machines.load(self.machine)
        return machine, machine.slots(self.block_tokens, self.memory)

    def knobs(self, name: str) -> list[dict[str, Any]]:
        """The values that a system's knob is tuned over; one empty choice where it has none."""
        machine, sizes = self._sizes()
        adapters = {a.name: a.rank for a in self.traffic(1.0, 1, REPORTED).header.adapters}
        setting = Setting(machine, self.block_tokens, adapters, *sizes)
        return systems.systems()[name].choices(setting)


def peak_of(
    scene: Scene, name: str, start: float, turns: Turns, stride: float = STRIDE, **knobs: Any
) -> peak.Peak:
    """The peak load of a system on the training workload."""

    def seconds(rate: float) -> float:
        return scene.mean_ttft(name, rate, turns.search, peak.LIMIT_S, **knobs)

    return peak.find(seconds, start, precise=PRECISE, stride=stride)


def best_knobs(scene: Scene, name: str, rate: float, turns: Turns) -> dict[str, Any]:
    """Those with the lowest mean TTFT at a rate, on the training workload; the middle ones where none serves it."""
    choices = scene.knobs(name)
    if len(choices) == 1:
        return choices[0]
    times = [scene.mean_ttft(name, rate, turns.search, 10 * peak.LIMIT_S, **knobs) for knobs in choices]
    least = min(times)
    return choices[times.index(least)] if least < float("inf") else choices[len(choices) // 2]


def tuned(
    scene: Scene, name: str, start: float, turns: Turns, stride: float = STRIDE
) -> tuple[dict[str, Any], peak.Peak]:
    """The best knobs of a system and its peak load with them; the search starts at ``start`` turns a second."""
    choices = scene.knobs(name)
    middle = choices[len(choices) // 2]
    first = peak_of(scene, name, start, turns, stride, **middle)
    if len(choices) == 1 or not first.rate:
        return middle, first
    best = best_knobs(scene, name, TUNING_LOAD * first.rate, turns)
    if best == middle:
        return best, first
    # Tuned for a load below the peak, it may bear less than it did: then the middle stays.
    second = peak_of(scene, name, first.rate, turns, NEAR_STRIDE, **best)
    return (best, second) if second.rate >= first.rate else (middle, first)


def measure(
    scene: Scene,
    turns: Turns,
    *,
    baselines: Sequence[str] = BASELINES,
    loads: Sequence[float] = (0.5, 0.7, 0.8),
    beside: Sequence[str] = (),
    beside_of: str = "hicache",
    sweep: Sequence[float] = (),
) -> dict[str, Any]:
    """Peaks of all; of each baseline, ELORA and :data:`RESIDENT` the figures at ``loads`` of the baseline's peak.

    ``beside``: systems and policies to serve at the loads of ``beside_of`` as well; their own peaks nobody asks for.
    ``sweep``: shares of ELORA's peak at which all that have peaks are served, for a curve.
    """
    start, stride = 4.0, STRIDE
    peaks: dict[str, peak.Peak] = {}
    chosen: dict[str, dict[str, Any]] = {}
    for name in (*baselines, "elora"):
        chosen[name], peaks[name] = tuned(scene, name, start, turns, stride)
        if peaks[name].rate:
            start, stride = peaks[name].rate, NEAR_STRIDE
    for name in beside:
        chosen[name] = best_knobs(scene, name, TUNING_LOAD * peaks[beside_of].rate, turns)
    cells = []
    for base in baselines:
        for load in loads if base not in ONE_LOAD else (TUNING_LOAD,):
            rate = load * peaks[base].rate
            if not rate:
                continue
            for name in dict.fromkeys((base, "elora", RESIDENT, *(beside if base == beside_of else ()))):
                figures = scene.serve(name, rate, turns.reported, REPORTED, **chosen.get(name, {}))
                cells.append({"of": base, "load": load, "rate": rate, "system": name, "figures": figures})
    curve = []
    for share in sweep:
        rate = share * peaks["elora"].rate
        for name in peaks:
            try:
                figures = scene.serve(name, rate, turns.reported, REPORTED, OVERLOADED_S, **chosen[name])
            except OverLimitError:
                continue
            curve.append({"system": name, "rate": rate, "ttft": figures["ttft"]})
    return {
        "scene": asdict(scene),
        "curve": curve,
        "peaks": {name: asdict(found) for name, found in peaks.items()},
        "knobs": chosen,
        "cells": cells,
    }
