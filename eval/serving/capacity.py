"""How many turns a second a server can do on this traffic, when every live session sends its next turn at once."""

from __future__ import annotations

from typing import Any

from elora_sglang.eval.serving import drive, model, runner
from elora_sglang.eval.serving.chat import Workload

TURNS = 2  # of every live session


def capacity(running: runner.Running, workload: Workload, *, seed: str, vocab: int) -> dict[str, Any]:
    """Turns a second until the last session is served; the server is stopped again.

    Not the answers of a fixed time: a server that lets the sessions of few adapters go round and round, while the
    others wait, would seem to do twice of what it can.
    """
    running.go()
    try:
        running.flush()
        names = [model.name(i) for i in range(workload.adapters)]
        turns, seconds = drive.burst(running.live.url, workload, names, turns=TURNS, seed=seed, vocab=vocab)
    finally:
        running.halt()
    return {"capacity": turns / seconds, "turns": turns, "seconds": seconds}
