"""One simulated run: a workload through a system on a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from elora_sglang.eval.sim.cache import Setting
from elora_sglang.eval.sim.clairvoyant import Clairvoyant
from elora_sglang.eval.sim.future import Future
from elora_sglang.eval.sim.limit import Limit
from elora_sglang.eval.sim.machine import Machine
from elora_sglang.eval.sim.results import Gauges, summarize
from elora_sglang.eval.sim.server import Outcome, Server
from elora_sglang.eval.sim.systems import CLAIRVOYANT, System
from elora_sglang.eval.sim.traffic import HintQuality, Traffic
from elora_sglang.eval.sim.unified import UnifiedCache
from elora_sglang.eval.workloads.model import Workload


@dataclass
class Run:
    """What a run leaves: figures, and the objects they come from."""

    figures: dict[str, Any]
    outcome: Outcome
    cache: UnifiedCache
    gauges: Gauges


def simulate(
    workload: Workload,
    system: System,
    machine: Machine,
    *,
    block_tokens: int,
    device_slots: int,
    host_slots: int,
    warmup_s: float = 0.0,
    hints: HintQuality | None = None,
    audit: bool = False,
    future: Future | None = None,
    limit: Limit | None = None,
    until_s: float | None = None,
    **knobs: Any,
) -> Run:
    """Serve the workload to its end; deterministic.

    Args:
        audit: check the books at the end (slow on large trees).
        future: of this workload; for ``clairvoyant``, which cannot do without.
        until_s: what would arrive later does not come, and what is counted is what arrived after the warm-up. So the
            load is the same to the end, where it would fade out with the last sessions; but systems that answer
            sessions at different times are counted on different turns. Without it, on the same.
        limit: raises OverLimitError as soon as the run is seen to end above it.
        others: as elsewhere.
    """
    traffic = Traffic(workload, block_tokens, hints, None if future is None else future.ids)
    setting = Setting(machine, block_tokens, traffic.adapters, device_slots, host_slots)
    if system.name == CLAIRVOYANT:
        if future is None:
            raise ValueError("clairvoyant needs the workload's future")
        policy = Clairvoyant(future)
        cache = system.cache(setting, policy=policy, **knobs)
        cache.before_serving = lambda req: policy.serve(req.rid)
    else:
        cache = system.cache(setting, **knobs)
    gauges = Gauges(cache)
    looks = (gauges.look,) if limit is None else (gauges.look, limit.look)
    outcome = Server(cache, *looks).run(traffic, math.inf if until_s is None else until_s)
    if audit:
        cache.audit()
    figures = summarize(outcome, cache, gauges, warmup_s, by_arrival=until_s is not None)
    return Run(figures, outcome, cache, gauges)
