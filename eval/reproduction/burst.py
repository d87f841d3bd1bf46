"""sglang#13349 in simulated time: eight adapters, then sixteen, with the memory of eight buffers."""

from __future__ import annotations

from typing import Any

from elora_sglang.eval.sim import machine as machines
from elora_sglang.eval.sim import systems
from elora_sglang.eval.sim.run import simulate
from elora_sglang.eval.workloads import create

MACHINE, BLOCK = "h100x2-llama-8b", 64
#: Slot buffers of the slotted systems there.
SLOTS = 8
SYSTEMS = ("stock", "stock-overlap", "hicache", "elora")


def measure(rate: float, duration_s: float) -> dict[str, Any]:
    """TTFT in seconds over 8 adapters and over 16, by system."""
    machine = machines.load(MACHINE)
    # The benchmark that the issue names draws lengths from 1 to what it is told.
    workload = create("burst", ranks="32", rate=rate, duration_s=duration_s, range_ratio=0.0, seed=1)
    device, host = machine.slots(BLOCK)
    found = {}
    for name in SYSTEMS:
        system = systems.systems()[name]
        knobs: dict[str, Any] = {"slots": SLOTS} if system.knob == "slots" else {}
        run = simulate(
            workload, system, machine, block_tokens=BLOCK, device_slots=device, host_slots=host, **knobs
        )
        early, late = (
            sorted(req.ttft for req in run.outcome.ended if (req.due < duration_s / 2) == first)
            for first in (True, False)
        )
        found[name] = {
            part: {"mean": sum(times) / len(times), "p50": times[len(times) // 2], "requests": len(times)}
            for part, times in (("8", early), ("16", late))
        }
    return found
