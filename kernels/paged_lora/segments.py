"""Which rows of a batch belong to which adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

#: Bringing rows of one adapter together costs a copy of the rows; not doing it costs extra matrix
#: products per module. Measured on a CPU (hidden 512, LoRA rank 16): a saved run pays for about 16 rows.
ROWS_PER_SAVED_RUN = 16


class AdapterWeights(Protocol):
    """What the kernels need of a resident adapter."""

    def module(self, layer: int, name: str) -> Any:
        """``rank_rows``, ``shrink`` and ``expand`` parts of one module, or None if it has none."""


class Segment(NamedTuple):
    """Rows ``[start, stop)`` of one adapter, counted in grouped order when the batch has an ``order``."""

    start: int
    stop: int
    adapter: AdapterWeights
    scaling: float


@dataclass(frozen=True, slots=True)
class SegmentBatch:
    """Active segments of one forward.

    ``order`` (int64 ``[active rows]`` or None): row numbers of the active rows, grouped by adapter;
    segments then index into it. None: segments index the batch's rows directly.
    """

    segments: tuple[Segment, ...]
    order: torch.Tensor | None = None


def plan_segments(
    lengths: Sequence[int],
    indices: Sequence[int],
    adapters: Sequence[AdapterWeights | None],
    scalings: Sequence[float],
    device: torch.device | str = "cpu",
) -> SegmentBatch:
    """Group the rows of a batch by adapter.

    Args:
        lengths: rows of each request, in batch order.
        indices: per request its position in ``adapters`` and ``scalings``.
        adapters: the batch's adapters; None means base model (its rows are skipped).
        scalings: LoRA scaling per adapter.
        device: where ``order`` is put.
    """
    runs: list[list[int]] = []  # [adapter index, start, stop], neighbours of one adapter merged
    row = 0
    for length, index in zip(lengths, indices, strict=True):
        if length and adapters[index] is not None:
            if runs and runs[-1][0] == index and runs[-1][2] == row:
                runs[-1][2] = row + length
            else:
                runs.append([index, row, row + length])
        row += length
    active = sum(stop - start for _, start, stop in runs)
    saved = len(runs) - len({index for index, _, _ in runs})
    order = None
    if saved and active <= ROWS_PER_SAVED_RUN * saved:
        runs, order = _grouped(runs, device)
    segments = tuple(
        Segment(start, stop, adapter, scalings[index])
        for index, start, stop in runs
        if (adapter := adapters[index]) is not None
    )
    return SegmentBatch(segments, order)


def _grouped(runs: list[list[int]], device: torch.device | str) -> tuple[list[list[int]], torch.Tensor]:
    """Runs of one adapter brought together, in order of first appearance, and the row order for it."""
    rows: dict[int, list[int]] = {}
    for index, start, stop in runs:
        rows.setdefault(index, []).extend(range(start, stop))
    merged: list[list[int]] = []
    for index, members in rows.items():
        start = merged[-1][2] if merged else 0
        merged.append([index, start, start + len(members)])
    flat = [row for members in rows.values() for row in members]
    return merged, torch.tensor(flat, dtype=torch.int64).to(device)
