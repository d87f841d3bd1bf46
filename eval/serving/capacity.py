"""How many turns a second a server can do on this traffic: all lanes without think times, as fast as it answers."""

from __future__ import annotations

from typing import Any

from elora_sglang.eval.serving import drive, runner
from elora_sglang.eval.serving.chat import Workload

NO_THINKING = 1e6  # turns a second asked for: the think times vanish


def capacity(
    running: runner.Running, workload: Workload, *, spread: float, seconds: float, seed: str, vocab: int
) -> dict[str, Any]:
    """Turns a second answered when every live session sends its next turn at once; a cell like any other."""
    (cell,) = runner.measure(
        running,
        workload,
        steps=[drive.Step(NO_THINKING, seconds)],
        spread=spread,
        seed=seed,
        vocab=vocab,
        saturate=True,
    )
    return cell | {"capacity": cell["summary"]["rate"]}
