"""One op on one set of inputs, with what must come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


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
