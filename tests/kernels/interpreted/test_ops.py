"""Every op's Triton kernel in Triton's interpreter, against its expected outputs and beside the reference."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from elora_sglang.eval.gpu.cases import OPS, Case, awkward
from elora_sglang.eval.gpu.cases.paged_lora import case as lora_case
from elora_sglang.eval.gpu.cases.paged_lora import make_inputs
from elora_sglang.kernels.paged_lora.tables import TableSet

SEED = random.SystemRandom().randrange(2**31)


def cases() -> list[Case]:
    return [case for op in OPS for case in awkward(op, SEED, "cpu")]


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.op}: {case.name}")
def test_op(case: Case, implementation: str) -> None:
    print(f"seed {SEED}")
    case.check(implementation)


@pytest.mark.parametrize("op", OPS)
def test_a_case_notices_one_wrong_number(op: str) -> None:
    print(f"seed {SEED}")
    checked = 0
    for case in awkward(op, SEED, "cpu"):
        right = case.run["reference"]()
        if not right.numel():
            continue

        def spoilt(right: torch.Tensor = right) -> torch.Tensor:
            wrong = right.clone().flatten()
            wrong[len(wrong) // 2] += 1
            return wrong.view_as(right)

        with pytest.raises(AssertionError):
            dataclasses.replace(case, run={"spoilt": spoilt}).check("spoilt")
        checked += 1
    assert checked > 10


def test_a_kernel_that_reads_another_slot_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong page of an adapter, as a stale table would give it."""
    inputs = make_inputs(seed=SEED, ranks=[8, 8], rows=[(0, 5), (1, 4)], page_size=16, scattered=True)
    case = lora_case("two adapters", inputs)
    case.check("triton")
    original = TableSet.of
    monkeypatch.setattr(TableSet, "of", lambda self, adapter: original(self, inputs.adapters[0]))
    with pytest.raises(AssertionError):
        lora_case("one adapter's pages for both", inputs).check("triton")
