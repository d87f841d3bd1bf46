"""The paper's workloads in the size of the evaluation model: shorter, because a CPU computes slowly.

Turns, arrivals, popularity and proportions stay; answers, preambles and think times shrink. What is changed stands in
the workload's header, as for any other parameters.
"""

from __future__ import annotations

from typing import Any

from elora_sglang.eval.workloads import create
from elora_sglang.eval.workloads.model import Workload

#: By workload, the parameters that differ from the generator's own.
SCALED: dict[str, dict[str, float]] = {
    "chat": {
        "turns": 3.0, "prompt_tokens": 100.0, "prompt_most": 800, "answer_tokens": 16.0, "answer_most": 64,
        "think_s": 10.0, "think_most": 60.0, "system_tokens": 300, "context_tokens": 2048,
    },
    "translation": {
        "sentence_most": 200, "answer_ratio": 0.5, "instruction_tokens": 200, "on_s": 10.0, "off_s": 20.0,
    },
    "agents": {
        "turns": 6.0, "preamble_tokens": 500.0, "preamble_most": 1000, "answer_tokens": 12.0, "answer_most": 48,
        "think_s": 5.0, "think_most": 30.0, "on_s": 10.0, "off_s": 20.0, "context_tokens": 2048,
    },
}  # fmt: skip


def workload(name: str, *, ranks: tuple[int, ...], **parameters: Any) -> Workload:
    """``parameters``: rate, duration_s, adapters, seed; ``ranks`` in turn, as the adapters on disk have them.

    Raises :class:`WorkloadError` for a workload that there is not.
    """
    listed = ",".join(map(str, ranks))
    return create(name, ranks=listed, drift_s=0.0, **parameters, **SCALED.get(name, {}))
