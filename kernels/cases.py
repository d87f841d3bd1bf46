"""Fresh random inputs of every op with what must come out: one test and one benchmark run them all."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

#: Folders of the ops.
OPS = ("paged_lora", "page_copy")


@dataclass(frozen=True)
class Case:
    """One op on one set of inputs.

    Attributes:
        op, name: for people.
        run: by implementation ("reference", "triton"), computes on poisoned outputs and returns them.
        expected: the outputs by other means, LoRA in float64.
        tolerance: absolute and relative; 0: the same bytes.
    """

    op: str
    name: str
    run: Mapping[str, Callable[[], torch.Tensor]]
    expected: Callable[[], torch.Tensor]
    tolerance: float

    def check(self, implementation: str) -> None:
        """Raises AssertionError where an implementation is wrong, or not the same twice."""
        found, expected = self.run[implementation](), self.expected()
        if self.tolerance:
            torch.testing.assert_close(
                found.double(), expected.double(), atol=self.tolerance, rtol=self.tolerance
            )
        elif not torch.equal(found, expected):
            raise AssertionError(f"{int((found != expected).sum())} of {found.numel()} numbers differ")
        if not torch.equal(found, self.run[implementation]()):
            raise AssertionError("the same inputs gave other bits the second time")


def awkward(op: str, seed: int, device: torch.device | str) -> Iterator[Case]:
    """Small cases of an op that are easily done wrong."""
    inputs = importlib.import_module(f"elora_sglang.kernels.{op}.inputs")
    yield from inputs.awkward(seed, device)
