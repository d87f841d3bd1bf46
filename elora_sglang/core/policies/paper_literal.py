"""Eq. 3-6 of the ELORA paper exactly as printed, with t in seconds: a control, not a recommendation.

What goes wrong: one second more of age outweighs a factor e of visits, so the score is LRU with counts as the
tie-break of the same second; the cost of a node grows with its size although its bytes do too, so one large node
outlives many small ones of equal worth; LoRA_Eval lowers an adapter's score exactly when evicting it leaves too few.
Computed plainly, ``1 - sigmoid(t)`` is 0 for every node older than 37 s, and all order is lost; the logarithm keeps it.
"""

from __future__ import annotations

from elora_sglang.core.policies.support.retain_eval import RetainEval


class PaperLiteral(RetainEval):
    """Eq. 6 as printed."""

    exact = False

    tau_s = 1.0
    paced = False
    per_byte = False
    sign = -1


def create() -> PaperLiteral:
    """A fresh policy."""
    return PaperLiteral()
