"""Every op's Triton kernel in Triton's interpreter, against its expected outputs and beside the reference."""

from __future__ import annotations

import random

import pytest

from elora_sglang.kernels.cases import OPS, Case, awkward

SEED = random.SystemRandom().randrange(2**31)


def cases() -> list[Case]:
    return [case for op in OPS for case in awkward(op, SEED, "cpu")]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.op}: {case.name}")
def test_op(case: Case, implementation: str) -> None:
    print(f"seed {SEED}")
    case.check(implementation)
