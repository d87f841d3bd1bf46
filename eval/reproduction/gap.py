"""How much of the way from LRU to the clairvoyant reference a policy goes on a real trace.

Policies were tuned on a third of the sessions (``simulate --sample 0.33``); those are left out. Of the others several
samples of sessions are drawn, so what is reported has an interval over sessions, not over requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from elora_sglang.eval.sim import machine as machines
from elora_sglang.eval.sim import systems
from elora_sglang.eval.sim.future import foresee
from elora_sglang.eval.sim.study import Job, Study, run_one
from elora_sglang.eval.sim.traffic import HintQuality
from elora_sglang.eval.support import estimates
from elora_sglang.eval.workloads import description
from elora_sglang.eval.workloads.draws import uniform
from elora_sglang.eval.workloads.model import Workload
from elora_sglang.eval.workloads.traces import open_trace
from elora_sglang.eval.workloads.transforms import filtered

MACHINE, BLOCK = "h800-llama-8b", 512
ADAPTERS, SKEW, DRIFT_S, SEED = 100, 0.9, 600.0, 0
#: Device memory as a share of the footprint; host over device, None: endless.
MEMORIES, HOSTS = (0.02, 0.05, 0.1), (4.0, None)
#: Recall and false positives of session-end hints.
HINTS = ((0.0, 0.0), (0.75, 0.0), (1.0, 0.0), (0.75, 0.1))
#: Share of sessions that policies were tuned on; samples of the others, and the share of them in each.
TUNED, SAMPLES, SHARE = 0.33, 4, 0.5
ENDLESS = 10**12
WARMUP_S = 600.0
POLICIES = ("lru", "lfu", "gdsf", "arc", "paper", "elora", systems.CLAIRVOYANT)


def held_out(trace: Path, number: int) -> Workload:
    """Sample ``number`` of the sessions that no policy was tuned on."""
    whole = open_trace(str(trace), adapters=ADAPTERS, skew=SKEW, drift_s=DRIFT_S, seed=SEED)
    return filtered(
        whole,
        lambda s: uniform("sample", SEED, s.id) >= TUNED and uniform("held-out", number, s.id) < SHARE,
        held_out=number,
    )


def measure(trace: Path, memory: float, host: float | None, number: int) -> dict[str, Any]:
    """Seconds to restore by every policy, by ``elora`` with hints, by the clairvoyant reference, and the bound."""
    machine = machines.load(MACHINE)
    workload = held_out(trace, number)
    found = description.measure(workload, BLOCK)
    if found is None:
        raise ValueError(f"{trace}: sample {number} has no sessions; give a longer trace")
    adapters = sum(machine.adapter_slots(one.rank, BLOCK) for one in workload.header.adapters)
    device = int(memory * (found.distinct_tokens // BLOCK + adapters))
    host_slots = ENDLESS if host is None else int(host * device)
    study = Study(workload, machine, BLOCK, WARMUP_S, HintQuality(), foresee(workload, BLOCK))
    kept = ("restore_s", "ttft", "kv_hits", "refused", "requests")
    runs: dict[str, Any] = {}
    for name, hint in (*((name, HINTS[0]) for name in POLICIES), *(("elora", hint) for hint in HINTS[1:])):
        hinted = replace(study, hints=HintQuality(*hint, seed=1))
        values = run_one(hinted, Job(name, (), device, host_slots, ""))
        runs[label(name, *hint)] = {key: values[key] for key in kept}
    bound = study.bound(device, host_slots).least
    about = {"memory": memory, "host": host, "sample": number, "device_slots": device, "bound_s": bound}
    return {**about, "systems": runs}


def label(name: str, recall: float = 0.0, false: float = 0.0) -> str:
    """Of one run."""
    if not recall and not false:
        return name
    return f"{name}, hints {100 * recall:.0f}/{100 * false:.0f}"


def closed(result: dict[str, Any], name: str) -> float:
    """Share of the way from LRU's cost to the clairvoyant's that a run closes."""
    cost = {key: values["restore_s"] for key, values in result["systems"].items()}
    return float((cost["lru"] - cost[name]) / (cost["lru"] - cost[systems.CLAIRVOYANT]))


def rows(results: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A header, and a row a run: % of the gap closed for each size of memory, with its interval over samples."""
    places = list(dict.fromkeys((one["memory"], one["host"]) for one in results))
    names = [name for name in results[0]["systems"] if name not in ("lru", systems.CLAIRVOYANT)]
    header = ["% of the way from LRU to clairvoyant"]
    header += [f"{memory:.0%}, host {'endless' if host is None else f'{host:g}x'}" for memory, host in places]
    table = []
    for name in names:
        row = [name]
        for place in places:
            found = [closed(one, name) for one in results if (one["memory"], one["host"]) == place]
            middle = estimates.interval(found)
            width = f" ± {100 * middle.half_width:.0f}" if len(found) > 1 else ""
            row.append(f"{100 * middle.mean:.0f}{width}")
        table.append(row)
    return header, table
