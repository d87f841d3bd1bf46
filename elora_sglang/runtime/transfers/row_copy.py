"""Copying the rows of a list of slots from one pool to another, one layer at a time."""

from __future__ import annotations

from itertools import pairwise

import torch

from elora_sglang.runtime.pool.views import UnifiedPool

#: Slots per run (on average) from which one copy per run beats one indexed copy of everything.
RUN_UNITS = 16
#: Where a kernel could copy scattered slots: up to so many runs are copied one by one, and all where they have so many
#: bytes on average.
FEW_RUNS, LONG_RUN = 8, 2**18


class RowCopy:
    """How the rows of ``source_slots`` get to ``target_slots``: found once, used for every layer.

    Slot i goes to slot i. Whole pages are copied as one row each; runs that are consecutive on both sides
    as one copy each; everything else by index. Between a GPU and pinned host memory a kernel moves what is scattered,
    a layer a launch; where the host memory is not pinned, its side moves in runs and the GPU gathers or scatters
    through a staging tensor.

    Args:
        source, target: the pools; row sizes and layers are equal.
        source_slots, target_slots: int64 ``[n]`` on the CPU, inside the pools; no target slot twice.
        kernel: whether to copy by the kernel; None: where a GPU reads or writes pinned memory.
    """

    def __init__(
        self,
        source: UnifiedPool,
        target: UnifiedPool,
        source_slots: torch.Tensor,
        target_slots: torch.Tensor,
        *,
        kernel: bool | None = None,
    ) -> None:
        self._source, self._target = source, target
        self._kernel: tuple[torch.Tensor, torch.Tensor] | None = None
        self.slots = len(source_slots)
        self._page = _common_page(source, target, source_slots, target_slots)
        froms = source_slots[:: self._page] // self._page
        tos = target_slots[:: self._page] // self._page
        self._from, self._to = froms, tos
        from_cuts, to_cuts = (_cuts(units) for units in (froms, tos))
        self._from_run, self._to_run = not len(from_cuts), not len(to_cuts)
        cuts = from_cuts if self._to_run else to_cuts if self._from_run else torch.cat([from_cuts, to_cuts])
        if not (self._from_run or self._to_run):
            cuts = cuts.unique()
        count = len(froms)
        by_kernel = kernel or (kernel is None and self._on_gpu and _pinned(source, target))
        if by_kernel:
            size = count * self._page * max(source.row_bytes)
            few = max(FEW_RUNS if kernel is None else 1, size // LONG_RUN)
        elif self._on_gpu:
            few = min(len(from_cuts), len(to_cuts)) + 1
        else:
            few = max(count // RUN_UNITS, 1)
        self._pairs: list[tuple[int, int, int]] | None = None
        self._host_runs: list[tuple[int, int]] = []
        if not count or len(cuts) < few:
            bounds = [0, *cuts.tolist(), count] if count else [0]
            self._pairs = [(int(froms[a]), int(tos[a]), b - a) for a, b in pairwise(bounds)]
        elif by_kernel:
            device = target.device if target.device.type == "cuda" else source.device
            slots = torch.stack([source_slots, target_slots]).to(torch.int32)
            if device.type == "cuda":
                slots = slots.pin_memory()
            moved = slots.to(device, non_blocking=True)
            self._kernel = moved[0], moved[1]
        elif source.device.type == "cuda":
            self._from = froms.to(source.device, non_blocking=True)
            self._host_runs = _runs(tos, to_cuts)
        elif target.device.type == "cuda":
            self._to = tos.to(target.device, non_blocking=True)
            self._host_runs = _runs(froms, from_cuts)

    @property
    def _on_gpu(self) -> bool:
        return "cuda" in (self._source.device.type, self._target.device.type)

    @property
    def how(self) -> str:
        """ "runs", "index", "kernel" or "staged", and rows per unit: for logs and tests."""
        if self._kernel is not None:
            return "kernel/1"
        kind = "runs" if self._pairs is not None else "staged" if self._on_gpu else "index"
        return f"{kind}/{self._page}"

    def copy_layer(self, layer: int) -> int:
        """Copy one layer. Asynchronous on a GPU stream. Returns the number of rows written, K and V."""
        if self._kernel is not None:
            from elora_sglang.kernels.page_copy.triton_kernel import copy_rows  # Triton only where it is used

            ends = [pool.copy_rows for pool in (self._source, self._target)]
            copy_rows(ends[0], ends[1], *self._kernel, range(layer, layer + 1))
            return 2 * self.slots
        rows = 0
        for stream in (0, 1):
            source, target = (self._units(pool, layer, stream) for pool in (self._source, self._target))
            if self._pairs is not None:
                for start, to, count in self._pairs:
                    target[to : to + count].copy_(source[start : start + count], non_blocking=True)
                    rows += count
            elif not len(self._from):
                continue
            elif self._target.device.type == "cuda":
                rows += self._scatter(source, target)
            elif self._source.device.type == "cuda":
                rows += self._gather(source, target)
            else:
                rows += self._index(source, target)
        return rows * self._page

    def same(self, layer: int) -> bool:
        """Whether both sides hold the same bytes in this layer. Waits for a GPU."""
        for stream in (0, 1):
            source, target = (self._units(pool, layer, stream) for pool in (self._source, self._target))
            kept = source.index_select(0, self._from.to(source.device)).cpu()
            if not torch.equal(kept, target.index_select(0, self._to.to(target.device)).cpu()):
                return False
        return True

    def _units(self, pool: UnifiedPool, layer: int, stream: int) -> torch.Tensor:
        words = pool.word_rows(layer, stream)
        return words if self._page == 1 else words.view(-1, self._page * words.shape[1])

    def _index(self, source: torch.Tensor, target: torch.Tensor) -> int:
        count = len(self._from)
        if self._to_run:
            first = int(self._to[0])
            torch.index_select(source, 0, self._from, out=target[first : first + count])
            return count
        if self._from_run:
            first = int(self._from[0])
            rows = source[first : first + count]
        else:
            rows = source.index_select(0, self._from)
        # torch scatters element by element: the widest element is the fastest; rows are 16-byte multiples
        target.view(torch.complex128).index_copy_(0, self._to, rows.view(torch.complex128))
        return count

    def _scatter(self, source: torch.Tensor, target: torch.Tensor) -> int:
        staging = torch.empty((len(self._to), target.shape[1]), dtype=target.dtype, device=target.device)
        at = 0
        for first, count in self._host_runs:
            staging[at : at + count].copy_(source[first : first + count], non_blocking=True)
            at += count
        target.index_copy_(0, self._to, staging)
        return at

    def _gather(self, source: torch.Tensor, target: torch.Tensor) -> int:
        staging = source.index_select(0, self._from)
        at = 0
        for first, count in self._host_runs:
            target[first : first + count].copy_(staging[at : at + count], non_blocking=True)
            at += count
        return at


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


def _cuts(units: torch.Tensor) -> torch.Tensor:
    """Places where a list of numbers does not go on with the next number."""
    return ((units[1:] - units[:-1]) != 1).nonzero().flatten() + 1


def _runs(units: torch.Tensor, cuts: torch.Tensor) -> list[tuple[int, int]]:
    """(first, count) of the runs of consecutive numbers, in list order. ``units`` is not empty."""
    bounds = [0, *cuts.tolist(), len(units)]
    return [(int(units[a]), b - a) for a, b in pairwise(bounds)]
