"""Many simulated runs of one workload: all systems, knobs and sizes of memory, on several cores."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from elora_sglang.eval.sim import systems
from elora_sglang.eval.sim.future import Future
from elora_sglang.eval.sim.machine import Machine
from elora_sglang.eval.sim.results import series
from elora_sglang.eval.sim.run import simulate
from elora_sglang.eval.sim.traffic import HintQuality
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
    """What all jobs share; forked workers find it in :data:`_study`."""

    workload: Workload
    machine: Machine
    block_tokens: int
    warmup_s: float
    hints: HintQuality
    future: Future | None
    series: bool = False


_study: Study | None = None


def _work(job: Job) -> dict[str, Any]:
    assert _study is not None
    begun = time.perf_counter()
    found = simulate(
        _study.workload,
        systems.systems()[job.system],
        _study.machine,
        block_tokens=_study.block_tokens,
        device_slots=job.device_slots,
        host_slots=job.host_slots,
        warmup_s=_study.warmup_s,
        hints=_study.hints,
        future=_study.future,
        **dict(job.knobs),
    )
    figures = {**found.figures, "wall_s": time.perf_counter() - begun}
    if _study.series:
        figures["series"] = series(found.outcome, found.gauges, _study.warmup_s)
    return figures


def jobs_of(study: Study, name: str, label: str, device: int, host: int) -> Iterator[Job]:
    """The runs of one system at one size of memory: one for each value of its knob.

    Raises ValueError where the memory is too small for it.
    """
    system = systems.systems()[name]
    adapters = {adapter.name: adapter.rank for adapter in study.workload.header.adapters}
    setting = systems.Setting(study.machine, study.block_tokens, adapters, device, host)
    values: list[Any] = [None]
    if system.knob == "slots":
        values = systems.slot_counts(setting)
        if not values:
            raise ValueError(
                f"{label} holds no adapter buffer of the largest rank beside KV; give more memory"
            )
    elif system.knob == "lora_share":
        values = systems.lora_shares()
    for value in values:
        knobs = () if value is None else ((str(system.knob), value),)
        yield Job(name, knobs, device, host, label)


def run_all(study: Study, jobs: list[Job], processes: int) -> dict[Job, dict[str, Any]]:
    """Figures of every job, with the seconds it took. ``processes``: how many work at once."""
    global _study  # a worker process inherits it by fork
    _study = study
    found: dict[Job, dict[str, Any]] = {}
    with tqdm(total=len(jobs), unit="run", leave=False) as bar:
        if processes < 2 or len(jobs) < 2:
            for job in jobs:
                bar.set_description(job.system)
                found[job] = _work(job)
                bar.update()
            return found
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(min(processes, len(jobs)), mp_context=context) as pool:
            waiting = {pool.submit(_work, job): job for job in jobs}
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                bar.set_description(waiting[done].system)
                bar.update()
    return found


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
