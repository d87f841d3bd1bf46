"""The simulated engine: times that can be computed by hand, books that add up, nothing lost."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.sim_world import MACHINE, changed, of, random_workload, single

from elora_sglang.eval.sim.machine import MachineError, load, names
from elora_sglang.eval.sim.requests import Request
from elora_sglang.eval.sim.run import Run, simulate
from elora_sglang.eval.sim.systems import CLAIRVOYANT, systems
from elora_sglang.eval.workloads.model import Piece, Session, Turn, Workload

SYSTEMS = systems()


def run(workload: Workload, system: str = "elora", device: int = 1000, host: int = 4000, **knobs: Any) -> Run:
    knobs.setdefault("machine", MACHINE)
    knobs.setdefault("block_tokens", 1)
    return simulate(
        workload,
        SYSTEMS[system],
        device_slots=device,
        host_slots=host,
        audit=True,
        **knobs,
    )


def requests(found: Run) -> dict[str, Request]:
    return {req.rid: req for req in found.outcome.ended}


def test_one_request_takes_its_prefill_and_its_steps() -> None:
    found = run(of([single("s", 1.0, 100, 11, adapter=None)]))
    (req,) = found.outcome.ended
    assert req.first == pytest.approx(1.0 + 0.1)
    assert req.ended == pytest.approx(req.first + 10 * 0.01)
    assert req.tpot == pytest.approx(0.01) and req.adapter_tier == "base"


def test_a_cold_adapter_hides_behind_its_prefill_but_for_one_layer() -> None:
    slow = changed(load_bytes_s=1e4)  # an adapter of 8 slots takes 0.8 s
    found = run(of([single("s", 0.0, 100, 1)]), machine=slow)
    (req,) = found.outcome.ended
    assert req.first == pytest.approx(0.8 + 0.1 / 10) and req.adapter_tier == "host"


def test_stock_waits_for_the_adapter_and_then_computes() -> None:
    slow = changed(load_bytes_s=1e4)
    found = run(of([single("s", 0.0, 100, 1)]), "stock", machine=slow, slots=2)
    (req,) = found.outcome.ended
    assert req.first == pytest.approx(0.8 + 0.1)


def test_the_next_turn_finds_the_conversation() -> None:
    first = Turn(0, (Piece(1, 100),), Piece(2, 21), at=0.0)
    second = Turn(2, (Piece(3, 30),), Piece(4, 1), think=5.0)
    found = run(of([Session("s", 0, (first, second))]))
    one, two = found.outcome.ended
    assert two.arrived == pytest.approx(one.ended + 5.0)
    assert two.device == 120  # the answer's last token was never fed to the model
    assert two.first - two.arrived == pytest.approx(0.031)
    assert two.known == 121 and two.restore_s == pytest.approx(1e-3)


def test_what_left_the_device_comes_back_from_the_host_in_time() -> None:
    talk = Session(
        "s",
        0,
        (
            Turn(0, (Piece(1, 400),), Piece(2, 1), at=0.0),
            Turn(2, (Piece(3, 10),), Piece(4, 1), think=100.0),
        ),
    )
    others = [single(f"o{i}", 10.0 + i, 300, 1, adapter=1 + i % 3, piece=100 + i) for i in range(20)]
    found = run(of([talk, *others]))
    again = requests(found)["s/1"]
    assert again.host > 0 and again.device + again.host == 400
    assert again.ttft < 0.05
    gone = requests(run(of([talk, *others]), host=0))["s/1"]
    assert gone.host == 0 and gone.ttft > 0.4


def test_requests_that_arrive_together_share_a_batch() -> None:
    pair = [single("a", 0.0, 100, 5, piece=1), single("b", 0.0, 100, 5, piece=2)]
    a, b = run(of(pair)).outcome.ended
    assert a.first == b.first == pytest.approx(0.2, rel=1e-2)


def test_a_long_prompt_is_computed_in_chunks() -> None:
    long, short = single("long", 0.0, 700, 2, piece=1), single("short", 0.3, 10, 2, piece=2)
    found = run(of([long, short], adapters=1))
    first = {req.rid: req.first for req in found.outcome.ended}
    # 256 + 256 + (188 and the short one) tokens, one after the other
    assert first["long/0"] == first["short/0"] == pytest.approx(0.71, rel=1e-2)


def test_a_request_that_never_fits_is_refused_and_others_are_served() -> None:
    found = run(of([single("big", 0.0, 2000, 1), single("small", 0.1, 10, 1, piece=9)]), "lru")
    assert found.outcome.refused == 1
    assert [req.rid for req in found.outcome.ended] == ["small/0"]


# The clairvoyant needs a future: test_sim_bounds.py audits it.
@pytest.mark.parametrize("system", sorted(set(SYSTEMS) - {CLAIRVOYANT}))
@pytest.mark.parametrize("block", [1, 7])
def test_nothing_is_lost_when_memory_is_short(system: str, block: int) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    workload = random_workload(seed)
    knobs = {"slots": 3} if SYSTEMS[system].knob == "slots" else {}
    found = run(workload, system, device=700 // block, host=1500 // block, block_tokens=block, **knobs)
    turns = sum(len(session.turns) for session in workload.sessions())
    assert len(found.outcome.ended) == turns and found.outcome.refused == 0
    for req in found.outcome.ended:
        assert req.arrived < req.first <= req.ended and req.made == req.answer_tokens
        assert req.device + req.host <= req.prefill_tokens
    again = run(workload, system, device=700 // block, host=1500 // block, block_tokens=block, **knobs)
    assert again.figures == found.figures


def test_requests_are_taken_back_when_decoding_runs_out_of_slots() -> None:
    many = [single(f"s{i}", 0.0, 40, 200, adapter=None, piece=i + 1) for i in range(8)]
    found = run(of(many), "lru", device=900)
    assert found.outcome.retractions > 0 and len(found.outcome.ended) == 8


def test_buffers_bound_the_adapters_of_a_batch() -> None:
    many = [single(f"s{i}", 0.0, 20, 20, adapter=i, piece=i + 1) for i in range(4)]
    together = run(of(many), "stock", slots=4)
    apart = run(of(many), "stock", slots=1)
    assert together.outcome.finished_at < apart.outcome.finished_at
    starts = sorted(req.first for req in apart.outcome.ended)
    ends = sorted(req.ended for req in apart.outcome.ended)
    assert all(start > end for start, end in zip(starts[1:], ends, strict=False))


def test_every_profile_loads_and_a_bad_one_says_what_is_wrong(tmp_path: object) -> None:
    assert {"h800-llama-8b", "h800-llama-34b", "h800-llama-70b", "h200-llama-8b"} <= set(names())
    for name in names():
        assert set(load(name).sources) >= {"default"}
    with pytest.raises(MachineError, match="no machine profile 'x'; there are: "):
        load("x")
    broken = f"{tmp_path}/broken.json"
    with open(broken, "w") as file:
        file.write(MACHINE.to_json().replace('"layers"', '"leyers"'))
    with pytest.raises(MachineError, match="layers, leyers"):
        load(broken)
    with pytest.raises(MachineError, match="prefill_token_s"):
        changed(prefill_token_s=-1)
