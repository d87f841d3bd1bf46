"""Copying the rows of a list of slots from one pool to another, one layer at a time.

There are five ways to copy, a class each; :func:`choose_way` is the one place that chooses:

=================  =====================================  ==========================================================
way                where                                  how
=================  =====================================  ==========================================================
:class:`Runs`      few pieces                             one copy for each piece that is consecutive on both sides
:class:`Indexed`   both pools on a CPU                    one indexed copy of everything
:class:`ByKernel`  GPU and pinned host memory             one launch a layer moves what is scattered on both sides
:class:`Gathered`  GPU to host memory, not pinned         the GPU gathers by index, the host side is written in runs
:class:`Scattered` host memory, not pinned, to GPU        the host side is read in runs, the GPU scatters by index
=================  =====================================  ==========================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from elora_sglang.runtime.pool.views import UnifiedPool

#: Units per run (on average) from which one copy per run beats one indexed copy of everything.
RUN_UNITS = 16
#: Where a kernel could copy scattered slots: up to so many runs are copied one by one, and all where they have so many
#: bytes on average.
MOST_RUNS, LONG_RUN = 8, 2**18


@dataclass(frozen=True)
class Units:
    """What goes where: unit i of ``source`` to unit i of ``target``. A unit is ``page`` slots in a row.

    Attributes:
        source, target: int64 ``[n]`` on the CPU.
        source_breaks, target_breaks: places where a list does not go on with the next number.
    """

    page: int
    source: torch.Tensor
    target: torch.Tensor
    source_breaks: torch.Tensor
    target_breaks: torch.Tensor

    @classmethod
    def of(
        cls, source: UnifiedPool, target: UnifiedPool, source_slots: torch.Tensor, target_slots: torch.Tensor
    ) -> Units:
        """Whole pages where both lists are whole pages in order, else single slots."""
        page = _common_page(source, target, source_slots, target_slots)
        units = [slots[::page] // page for slots in (source_slots, target_slots)]
        return cls(page, *units, *(_breaks(one) for one in units))

    def __len__(self) -> int:
        return len(self.source)

    def breaks(self) -> torch.Tensor:
        """Places where either list does not go on."""
        if not len(self.target_breaks):
            return self.source_breaks
        if not len(self.source_breaks):
            return self.target_breaks
        return torch.cat([self.source_breaks, self.target_breaks]).unique()


class Way(Protocol):
    """How the units of one K or V tensor, or of a whole layer, are copied. Asynchronous on a GPU stream."""

    name: str

    def copy_layer(self, copy: RowCopy, layer: int) -> int:
        """Copy one layer; rows written, K and V together."""
        ...


class _StreamByStream:
    """A way that copies K, then V."""

    def copy_layer(self, copy: RowCopy, layer: int) -> int:
        """Copy one layer; rows written."""
        ends = [[copy.rows_of(pool, layer, stream) for pool in copy.pools] for stream in (0, 1)]
        return copy.units.page * sum(self.move(source, target) for source, target in ends)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> int:
        """Copy between two tensors ``[units, words]``; units written."""
        raise NotImplementedError


class Runs(_StreamByStream):
    """One copy for each run of units that is consecutive on both sides."""

    name = "runs"

    def __init__(self, units: Units, breaks: torch.Tensor) -> None:
        bounds = [0, *breaks.tolist(), len(units)] if len(units) else [0]
        self._runs = [(int(units.source[a]), int(units.target[a]), b - a) for a, b in pairwise(bounds)]

    def move(self, source: torch.Tensor, target: torch.Tensor) -> int:
        """Run by run."""
        for first, to, count in self._runs:
            target[to : to + count].copy_(source[first : first + count], non_blocking=True)
        return sum(count for _, _, count in self._runs)


class Indexed(_StreamByStream):
    """One indexed copy of everything, on a CPU."""

    name = "index"

    def __init__(self, units: Units) -> None:
        self._units = units

    def move(self, source: torch.Tensor, target: torch.Tensor) -> int:
        """By index on the side that is scattered."""
        units, count = self._units, len(self._units)
        if not len(units.target_breaks):
            first = int(units.target[0])
            torch.index_select(source, 0, units.source, out=target[first : first + count])
            return count
        if not len(units.source_breaks):
            first = int(units.source[0])
            rows = source[first : first + count]
        else:
            rows = source.index_select(0, units.source)
        # torch scatters element by element: the widest element is the fastest; rows are 16-byte multiples
        target.view(torch.complex128).index_copy_(0, units.target, rows.view(torch.complex128))
        return count


class ByKernel:
    """A Triton kernel copies both streams of a layer, slot by slot, in one launch."""

    name = "kernel"

    def __init__(
        self, source_slots: torch.Tensor, target_slots: torch.Tensor, device: torch.device | str
    ) -> None:
        slots = torch.stack([source_slots, target_slots]).to(torch.int32)
        if torch.device(device).type == "cuda":
            slots = slots.pin_memory()
        self._source, self._target = slots.to(device, non_blocking=True)

    def copy_layer(self, copy: RowCopy, layer: int) -> int:
        """Copy one layer; rows written."""
        from elora_sglang.kernels.page_copy.triton_kernel import copy_rows  # Triton only where it is used

        source, target = (pool.copy_rows for pool in copy.pools)
        copy_rows(source, target, self._source, self._target, range(layer, layer + 1))
        return 2 * copy.slots


class Gathered(_StreamByStream):
    """The GPU gathers into a staging tensor, which the host takes in runs."""

    name = "staged"

    def __init__(self, units: Units, source: UnifiedPool) -> None:
        self._source = units.source.to(source.device, non_blocking=True)
        self._host_runs = _runs(units.target, units.target_breaks)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> int:
        """Gather, then run by run."""
        staging = source.index_select(0, self._source)
        at = 0
        for first, count in self._host_runs:
            target[first : first + count].copy_(staging[at : at + count], non_blocking=True)
            at += count
        return at


class Scattered(_StreamByStream):
    """The host gives runs to a staging tensor, from which the GPU scatters."""

    name = "staged"

    def __init__(self, units: Units, target: UnifiedPool) -> None:
        self._target = units.target.to(target.device, non_blocking=True)
        self._host_runs = _runs(units.source, units.source_breaks)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> int:
        """Run by run, then scatter."""
        staging = torch.empty((len(self._target), target.shape[1]), dtype=target.dtype, device=target.device)
        at = 0
        for first, count in self._host_runs:
            staging[at : at + count].copy_(source[first : first + count], non_blocking=True)
            at += count
        target.index_copy_(0, self._target, staging)
        return at


def choose_way(
    source: UnifiedPool,
    target: UnifiedPool,
    source_slots: torch.Tensor,
    target_slots: torch.Tensor,
    units: Units,
) -> Way:
    """The fastest way to copy ``units``, which are these slots."""
    breaks = units.breaks()
    on_gpu = _on_gpu(source, target)
    by_kernel = on_gpu and _pinned(source, target)
    if by_kernel:
        bytes_of_side = len(source_slots) * max(source.row_bytes)
        most_runs = max(MOST_RUNS, bytes_of_side // LONG_RUN)
    elif on_gpu:
        most_runs = min(len(units.source_breaks), len(units.target_breaks)) + 1
    else:
        most_runs = max(len(units) // RUN_UNITS, 1)
    if not len(units) or len(breaks) < most_runs:
        return Runs(units, breaks)
    if by_kernel:
        device = target.device if target.device.type == "cuda" else source.device
        return ByKernel(source_slots, target_slots, device)
    if target.device.type == "cuda":
        return Scattered(units, target)
    if source.device.type == "cuda":
        return Gathered(units, source)
    return Indexed(units)


class RowCopy:
    """How the rows of ``source_slots`` get to ``target_slots``: found once, used for every layer.

    Slot i goes to slot i. Whole pages are copied as one row each.

    Args:
        source, target: the pools; row sizes and layers are equal.
        source_slots, target_slots: int64 ``[n]`` on the CPU, inside the pools; no target slot twice.
        way: taken instead of the one that :func:`choose_way` finds; for tests.

    Attributes:
        pools: source and target.
        slots: how many.
        units: what goes where.
    """

    def __init__(
        self,
        source: UnifiedPool,
        target: UnifiedPool,
        source_slots: torch.Tensor,
        target_slots: torch.Tensor,
        *,
        way: Way | None = None,
    ) -> None:
        self.pools = source, target
        self.slots = len(source_slots)
        self.units = Units.of(source, target, source_slots, target_slots)
        self._way = way or choose_way(source, target, source_slots, target_slots, self.units)

    @property
    def how(self) -> str:
        """Name of the way, and slots per unit: for logs and tests."""
        return f"{self._way.name}/{1 if isinstance(self._way, ByKernel) else self.units.page}"

    def copy_layer(self, layer: int) -> int:
        """Copy one layer. Asynchronous on a GPU stream. Returns the number of rows written, K and V."""
        return self._way.copy_layer(self, layer)

    def same(self, layer: int) -> bool:
        """Whether both sides hold the same bytes in this layer. Waits for a GPU."""
        for stream in (0, 1):
            source, target = (self.rows_of(pool, layer, stream) for pool in self.pools)
            sent = source.index_select(0, self.units.source.to(source.device)).cpu()
            if not torch.equal(sent, target.index_select(0, self.units.target.to(target.device)).cpu()):
                return False
        return True

    def rows_of(self, pool: UnifiedPool, layer: int, stream: int) -> torch.Tensor:
        """K (0) or V (1) of a layer as words ``[units of the pool, words of a unit]``; a view."""
        words, page = pool.word_rows(layer, stream), self.units.page
        return words if page == 1 else words.view(-1, page * words.shape[1])


def _on_gpu(source: UnifiedPool, target: UnifiedPool) -> bool:
    return "cuda" in (source.device.type, target.device.type)


def _pinned(*pools: UnifiedPool) -> bool:
    return all(pool.device.type == "cuda" or pool.word_rows(0, 0).is_pinned() for pool in pools)


def _common_page(source: UnifiedPool, target: UnifiedPool, *slots: torch.Tensor) -> int:
    """The page size if both lists are whole pages in order, else 1."""
    page = source.page_size
    if page == 1 or target.page_size != page or source.rows % page or target.rows % page:
        return 1
    inside = torch.arange(page)
    for one in slots:
        if len(one) % page:
            return 1
        starts = one[::page]
        if bool((starts % page != 0).any()) or not torch.equal(one.view(-1, page), starts[:, None] + inside):
            return 1
    return page


def _breaks(units: torch.Tensor) -> torch.Tensor:
    # numpy looks at the same memory, and starts an operation several times faster: these lists are short.
    numbers = units.numpy()
    return torch.from_numpy(np.flatnonzero(numbers[1:] - numbers[:-1] != 1) + 1)


def _runs(units: torch.Tensor, breaks: torch.Tensor) -> list[tuple[int, int]]:
    """(first, count) of the runs of consecutive numbers, in list order. ``units`` is not empty."""
    bounds = [0, *breaks.tolist(), len(units)]
    return [(int(units[a]), b - a) for a, b in pairwise(bounds)]
