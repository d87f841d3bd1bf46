"""The simulator asks the server's own admission: its decisions are in the trace, and strict order is a baseline's."""

from __future__ import annotations

import json

from support.sim_world import MACHINE, changed, of, single

from elora_sglang.core.swapper import SwapSettings
from elora_sglang.core.trace import Recorder, replay
from elora_sglang.eval.sim.cache import Setting
from elora_sglang.eval.sim.server import Outcome, Server
from elora_sglang.eval.sim.traffic import Traffic
from elora_sglang.eval.sim.unified import UnifiedCache
from elora_sglang.eval.workloads.model import Workload


def serve(workload: Workload, *, device: int, lines: list[str] | None = None) -> tuple[Outcome, UnifiedCache]:
    traffic = Traffic(workload, 1, None, None)
    settings = SwapSettings(host_slots=2000)
    cache = UnifiedCache(Setting(MACHINE, 1, {}, device, 2000), policy="elora", settings=settings)
    if lines is not None:
        Recorder(cache.manager, lines.append)
    cache.place_adapters(Setting(MACHINE, 1, traffic.adapters, device, 2000))
    outcome = Server(cache).run(traffic)
    cache.audit()
    return outcome, cache


def pressed() -> Workload:
    """One long answer holds adapter a0; a1 does not fit beside it; short requests of the base model follow."""
    holder = single("holder", 0.0, 20, 150, adapter=0, piece=1)
    waiter = single("waiter", 0.5, 20, 5, adapter=1, piece=2)
    short = [single(f"short{i}", 0.6 + i / 10, 10, 5, adapter=None, piece=10 + i) for i in range(8)]
    return of([holder, waiter, *short], adapters=2, rank=300)


def test_short_requests_pass_one_that_lacks_room_for_its_adapter() -> None:
    outcome, cache = serve(pressed(), device=500)
    ended = {req.session: req for req in outcome.ended}
    overtaking = cache.manager.admission.overtaking
    assert overtaking.passes == 8
    assert max(ended[f"short{i}"].first for i in range(8)) < ended["waiter"].first
    assert ended["waiter"].first - ended["holder"].ended < 0.2, "it enters as soon as its room is there"


def test_a_simulated_run_replays_with_its_admission_decisions() -> None:
    lines: list[str] = []
    _, cache = serve(pressed(), device=500, lines=lines)
    events = [json.loads(line)[0] for line in lines[1:]]
    assert (
        cache.manager.admission.overtaking.passes and events.count("no_room") + events.count("bring_in") > 3
    )
    assert replay(lines).mismatch is None
    number = next(n for n, name in enumerate(events, 1) if name == "consider")
    lines[number] = lines[number].replace('["entry",true', '["entry",false')
    mismatch = replay(lines).mismatch
    assert mismatch is not None and mismatch.startswith(f"event {number} (consider)")


def test_a_third_file_waits_for_the_next_pass() -> None:
    """Without a host copy an adapter is read while everybody waits: two a pass, as in the server."""
    many = [single(f"s{i}", 0.0, 5, 2, adapter=i, piece=1 + i) for i in range(4)]
    traffic = Traffic(of(many, adapters=4, rank=10), 1, None, None)
    machine = changed(disk_bytes_s=1e6)
    setting = Setting(machine, 1, traffic.adapters, 400, 0)
    cache = UnifiedCache(setting, policy="lru", settings=SwapSettings())
    outcome = Server(cache).run(traffic)
    firsts = sorted(req.first for req in outcome.ended)
    assert firsts[0] == firsts[1] < firsts[2] == firsts[3]
