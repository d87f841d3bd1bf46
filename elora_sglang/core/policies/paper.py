"""Eq. 3-6 of the ELORA paper, read as they are meant: per byte, a time unit of minutes, Eq. 4 with the right sign."""

from __future__ import annotations

from elora_sglang.core.policies.support.retain_eval import RetainEval
from elora_sglang.core.policies.support.reuse_clock import STANDARD_S


class Paper(RetainEval):
    """Eq. 6 corrected: cost per byte, ``sigmoid(-t / tau)``, an adapter counts more while there are too few.

    tau is about twice the median gap between the turns of a conversation, learned (300 s until then). Low_lora counts
    waiting requests.
    """

    exact = False

    tau_s = STANDARD_S
    paced = True
    per_byte = True
    sign = 1


def create() -> Paper:
    """A fresh policy."""
    return Paper()
