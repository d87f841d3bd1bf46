"""Small workloads and machines for tests of the simulator."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from elora_sglang.eval.sim import machine
from elora_sglang.eval.workloads.model import Adapter, Header, Piece, Session, Turn, Workload

#: A GPU with round figures: 1 ms a token to prefill, 10 ms a step, a slot of one token 1,000 bytes and 1 us to load.
MACHINE = machine.Machine(
    name="test",
    sources={"default": "made up"},
    gpus=1,
    kv_bytes_per_token=1000,
    adapter_bytes_per_rank=1000,
    layers=10,
    device_bytes=1e6,
    host_bytes=4e6,
    load_bytes_s=1e9,
    save_bytes_s=1e9,
    disk_bytes_s=1e8,
    latency_s=0.0,
    prefill_token_s=1e-3,
    prefill_token2_s=0.0,
    step_s=1e-2,
    step_request_s=0.0,
    step_context_s=0.0,
    step_rank_s=0.0,
    iteration_s=0.0,
    front_s=0.0,
    slot_load_s=0.0,
    max_running=8,
    chunk_tokens=256,
)


def changed(**fields: Any) -> machine.Machine:
    """The machine with other constants."""
    return replace(MACHINE, **fields)


def of(sessions: Sequence[Session], adapters: int = 4, rank: int = 8) -> Workload:
    """A workload of these sessions."""
    header = Header("test", 0, {}, tuple(Adapter(f"a{i}", rank) for i in range(adapters)))
    return Workload(header, lambda: iter(sessions))


def single(id: str, at: float, prompt: int, answer: int, adapter: int | None = 0, piece: int = 1) -> Session:
    """One request."""
    turn = Turn(0, (Piece(piece, prompt),), Piece(-piece, answer), at=at)
    return Session(id, adapter, (turn,))


def random_workload(seed: int, *, sessions: int = 40, adapters: int = 6, rate: float = 4.0) -> Workload:
    """Sessions of several turns, closed loop, with shared system prompts, ranks mixed."""
    header = Header("random", seed, {}, tuple(Adapter(f"a{i}", (4, 8, 16)[i % 3]) for i in range(adapters)))

    def stream() -> Iterator[Session]:
        rng, at, piece = random.Random(seed), 0.0, 1000
        for number in range(sessions):
            at += rng.expovariate(rate)
            adapter = rng.choice([None, *range(adapters)])
            turns: list[Turn] = []
            for turn in range(rng.randint(1, 4)):
                piece += 2
                said = Piece(piece, rng.randint(1, 90))
                system = (Piece(1 + (adapter or 0), 40),) if turn == 0 else ()
                turns.append(
                    Turn(
                        0 if turn == 0 else 2 * turn + 1,
                        (*system, said),
                        Piece(piece + 1, rng.randint(1, 30)),
                        think=None if turn == 0 else rng.expovariate(2.0),
                        at=at if turn == 0 else None,
                    )
                )
            yield Session(f"s{number}", adapter, tuple(turns))

    return Workload(header, stream)
