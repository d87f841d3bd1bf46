"""Many simulated runs of one workload: all systems, knobs and sizes of memory, on several cores."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from elora_sglang.eval.sim import systems
from elora_sglang.eval.sim.bound import Bound, lower_bound
from elora_sglang.eval.sim.cache import Setting
from elora_sglang.eval.sim.future import Future
from elora_sglang.eval.sim.machine import Machine
from elora_sglang.eval.sim.results import series
from elora_sglang.eval.sim.run import simulate
from elora_sglang.eval.sim.traffic import HintQuality
from elora_sglang.eval.support import pool
from elora_sglang.eval.workloads.model import Workload


@dataclass(frozen=True)
class Job:
    """One simulated run: a system with one value of its knob, at one size of memory."""

    system: str
    knobs: tuple[tuple[str, Any], ...]
    device_slots: int
    host_slots: int
    label: str


@dataclass
class Study:
    """What all jobs share."""

    workload: Workload
    machine: Machine
    block_tokens: int
    warmup_s: float
    hints: HintQuality
    future: Future | None
    series: bool = False

    def bound(self, device_slots: int, host_slots: int) -> Bound:
        """What no policy can go below with these tiers. The future must be known."""
        assert self.future is not None
        machine, block = self.machine, self.block_tokens
        slots = {a.name: machine.adapter_slots(a.rank, block) for a in self.workload.header.adapters}
        return lower_bound(
            self.future, machine.costs(block), slots,
            device_slots=device_slots, host_slots=host_slots, warmup_s=self.warmup_s,
        )  # fmt: skip


def run_one(study: Study, job: Job) -> dict[str, Any]:
    """Figures of one job, with the seconds it took."""
    begun = time.perf_counter()
    found = simulate(
        study.workload,
        systems.systems()[job.system],
        study.machine,
        block_tokens=study.block_tokens,
        device_slots=job.device_slots,
        host_slots=job.host_slots,
        warmup_s=study.warmup_s,
        hints=study.hints,
        future=study.future,
        **dict(job.knobs),
    )
    figures = {**found.figures, "wall_s": time.perf_counter() - begun}
    if study.series:
        figures["series"] = series(found.outcome, found.gauges, study.warmup_s)
    return figures


def jobs_of(study: Study, name: str, label: str, device: int, host: int) -> Iterator[Job]:
    """The runs of one system at one size of memory: one for each value of its knob.

    Raises ValueError where the memory is too small for it.
    """
    adapters = {adapter.name: adapter.rank for adapter in study.workload.header.adapters}
    setting = Setting(study.machine, study.block_tokens, adapters, device, host)
    choices = systems.systems()[name].choices(setting)
    if not choices:
        raise ValueError(f"{label} holds no adapter buffer of the largest rank beside KV; give more memory")
    for knobs in choices:
        yield Job(name, tuple(knobs.items()), device, host, label)


def run_all(study: Study, jobs: list[Job], processes: int) -> dict[Job, dict[str, Any]]:
    """Figures of every job, with the seconds it took. ``processes``: how many work at once."""
    labels = [job.system for job in jobs]
    found = pool.compute(
        lambda number: run_one(study, jobs[number]), labels, range(len(jobs)), processes, "run"
    )
    return {jobs[number]: figures for number, figures in found.items()}


def best_of(found: dict[Job, dict[str, Any]], name: str, label: str) -> tuple[Job, dict[str, Any]]:
    """The run of a system with the lowest mean TTFT among those that refused fewest."""
    mine = [(job, values) for job, values in found.items() if job.system == name and job.label == label]
    return min(mine, key=lambda one: (one[1]["refused"], one[1]["ttft"]["mean"], one[0].knobs))


def gap_closed(values: dict[str, Any], found: dict[str, dict[str, Any]]) -> float | None:
    """Share of the way from LRU's cost to the clairvoyant reference's; None where one of them was not run."""
    if "lru" not in found or systems.CLAIRVOYANT not in found:
        return None
    lru = found["lru"]["restore_s"]
    way = lru - found[systems.CLAIRVOYANT]["restore_s"]
    return (lru - values["restore_s"]) / way if way > 0 else None
