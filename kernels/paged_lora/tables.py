"""What the Triton kernels read of an adapter and of a batch: small static tables on the device.

An adapter brings two of them, its slots and its *entries*; a batch says which adapters its rows belong to. Both are
plain int32/int64 tensors at fixed addresses, so a CUDA graph that was captured with one batch serves any other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch

from elora_sglang.kernels.paged_lora.segments import SegmentBatch

#: Entries per module and layer: the pieces of A, then those of the slices' B. A fused module has three slices at most,
#: and at most one matrix of a layer is cut in two (runtime/pool/layout.py).
SHRINK, EXPAND = 2, 4
#: stream, first element in the stream, first LoRA-rank row, rows, first output column, columns
FIELDS = 6
#: int32 numbers of one module of one layer
STRIDE = (SHRINK + EXPAND) * FIELDS
#: Bytes that all matrices and rows are aligned to; one load of a GPU thread.
LOAD_BYTES = 16


class PieceLike(Protocol):
    """As ``runtime.layout.Piece``."""

    module: str
    matrix: int
    row: int
    rows: int
    cols: int
    stream: int
    offset: int


class LayoutLike(Protocol):
    """As ``runtime.layout.AdapterLayout``."""

    layers: Sequence[Any]
    itemsize: int


class PackedLike(Protocol):
    """A resident adapter, as ``runtime.packing.PackedAdapter``. ``slots``: int64, ascending."""

    layout: LayoutLike
    slots: torch.Tensor


def entries(
    pieces: Sequence[PieceLike], slices: Sequence[tuple[int, int, int]], itemsize: int
) -> list[list[int]]:
    """The entries of one module of one layer; what is not used has 0 rows.

    Args:
        pieces: of the module, ordered by matrix, then row.
        slices: (first output column, columns, LoRA rank) of each B.
        itemsize: bytes of a stored element.

    Raises:
        ValueError: more pieces than the tables hold.
    """
    found = [[0] * FIELDS for _ in range(SHRINK + EXPAND)]
    used = [0, 0]
    for piece in pieces:
        kind = min(piece.matrix, 1)
        if used[kind] == (SHRINK, EXPAND)[kind]:
            raise ValueError(f"{piece.module} lies in more pieces than a kernel's table holds")
        above, columns = 0, (0, 0)
        if kind:
            above = sum(rank for _, _, rank in slices[: piece.matrix - 1])
            columns = slices[piece.matrix - 1][:2]
        at = used[kind] + (SHRINK if kind else 0)
        found[at] = [piece.stream, piece.offset // itemsize, above + piece.row, piece.rows, *columns]
        used[kind] += 1
    return found


@dataclass(frozen=True)
class Tables:
    """What the kernels need of a resident adapter.

    Attributes:
        slots: int32 ``[slots]``, ascending.
        entries: int32 ``[layers, modules, SHRINK + EXPAND, FIELDS]``, see :func:`entries`; shared by all adapters of a
            layout.
        rank_rows: most LoRA-rank rows in one module.
        rank: most of them in one part of a module.
    """

    slots: torch.Tensor
    entries: torch.Tensor
    rank_rows: int
    rank: int


class TableSet:
    """Tables of adapters by need, as long as the adapters live.

    Args:
        modules: names of the linear modules, in the order of the tables' second dimension.
        device: of the tables.
    """

    def __init__(self, modules: Sequence[str], device: torch.device | str) -> None:
        self.modules = {name: number for number, name in enumerate(modules)}
        self.device = torch.device(device)
        self._entries: dict[int, tuple[LayoutLike, torch.Tensor, int, int]] = {}
        self._tables: WeakKeyDictionary[PackedLike, Tables] = WeakKeyDictionary()

    def of(self, adapter: PackedLike) -> Tables:
        """The adapter's tables. Raises KeyError for a module that is not among ``modules``."""
        found = self._tables.get(adapter)
        if found is None:
            _, table, rank_rows, rank = self._layout(adapter.layout)
            slots = adapter.slots.to(device=self.device, dtype=torch.int32)
            found = self._tables[adapter] = Tables(slots, table, rank_rows, rank)
        return found

    def _layout(self, layout: LayoutLike) -> tuple[LayoutLike, torch.Tensor, int, int]:
        if id(layout) not in self._entries:
            numbers = torch.zeros(
                (len(layout.layers), len(self.modules), SHRINK + EXPAND, FIELDS), dtype=torch.int32
            )
            rank_rows = rank = 0
            for index, layer in enumerate(layout.layers):
                for shape in layer.modules:
                    slices = [(part.offset, part.width, part.rank) for part in shape.slices]
                    found = entries(layer.pieces_of(shape.name), slices, layout.itemsize)
                    numbers[index, self.modules[shape.name]] = torch.tensor(found, dtype=torch.int32)
                    rank_rows = max(rank_rows, shape.rank_rows)
                    rank = max(rank, *(part.rank for part in shape.slices))
            self._entries[id(layout)] = layout, numbers.to(self.device), rank_rows, rank
        return self._entries[id(layout)]


def vector(itemsize: int, *sizes: int) -> int:
    """Elements that one load may take where all ``sizes`` (elements) are starts or lengths of rows."""
    return gcd(LOAD_BYTES // itemsize, *sizes)


@dataclass(frozen=True)
class DeviceBatch:
    """The rows of one forward for the kernels; all tensors on the device, sizes are capacities.

    Attributes:
        order: int64 ``[rows]``, the batch's row of each grouped row.
        tiles: int32 ``[tiles, 3]``: adapter, first grouped row, rows; up to ``tile_rows`` rows, 0 for none.
        adapters: int64 ``[adapters, 2]``: addresses of an adapter's slot and entry tables.
        scalings: float32 ``[adapters]``.
        tile_rows: rows of a tile, a power of two from 16 up.
        rank_rows, rank: no adapter has more LoRA-rank rows than these in a module, and in a part of one.
        fixed: whether sizes are capacities for any batch, not those of one.
        tables: where adapters' tables come from.
        keep: those that the addresses point to.
    """

    order: torch.Tensor
    tiles: torch.Tensor
    adapters: torch.Tensor
    scalings: torch.Tensor
    tile_rows: int
    rank_rows: int
    rank: int
    fixed: bool
    tables: TableSet
    keep: list[Tables]

    @classmethod
    def empty(
        cls, tables: TableSet, rows: int, adapters: int, *, rank_rows: int, rank: int, tile_rows: int
    ) -> DeviceBatch:
        """Room for any batch of so many rows and adapters: what a CUDA graph is captured with."""
        return cls(
            order=torch.zeros(rows, dtype=torch.int64, device=tables.device),
            tiles=torch.zeros((rows, 3), dtype=torch.int32, device=tables.device),
            adapters=torch.zeros((adapters, 2), dtype=torch.int64, device=tables.device),
            scalings=torch.zeros(adapters, dtype=torch.float32, device=tables.device),
            tile_rows=tile_rows,
            rank_rows=rank_rows,
            rank=rank,
            fixed=True,
            tables=tables,
            keep=[],
        )

    @classmethod
    def of(cls, tables: TableSet, batch: SegmentBatch, *, tile_rows: int) -> DeviceBatch:
        """``batch`` in tables no larger than it needs."""
        plan = _plan(batch, tables, tile_rows)
        rank_rows = max((one.rank_rows for one in plan.adapters), default=1)
        rank = max((one.rank for one in plan.adapters), default=1)
        whole = cls.empty(
            tables,
            max(len(plan.order), 1),
            max(len(plan.adapters), 1),
            rank_rows=rank_rows,
            rank=rank,
            tile_rows=tile_rows,
        )
        made = replace(whole, fixed=False, tiles=whole.tiles[: max(len(plan.tiles), 1)])
        made._write(plan)
        return made

    def first(self, rows: int) -> DeviceBatch:
        """The same memory for a batch of ``rows`` rows at most: fewer programs are started for it."""
        return replace(self, tiles=self.tiles[:rows], order=self.order[:rows])

    def fill(self, batch: SegmentBatch) -> None:
        """Put another batch into the same memory. Mutates the tensors, without waiting for the device.

        Raises ValueError where it does not fit; nothing is changed then.
        """
        self._write(_plan(batch, self.tables, self.tile_rows))

    def _write(self, plan: _Plan) -> None:
        fits = (
            len(plan.order) <= len(self.order)
            and len(plan.tiles) <= len(self.tiles)
            and len(plan.adapters) <= len(self.adapters)
            and all(one.rank_rows <= self.rank_rows and one.rank <= self.rank for one in plan.adapters)
        )
        if not fits:
            ranks = max((one.rank_rows for one in plan.adapters), default=0)
            raise ValueError(
                f"a batch of {len(plan.order)} rows and {len(plan.adapters)} adapters with {ranks} LoRA-rank rows does "
                f"not fit tables for {len(self.order)}, {len(self.adapters)} and {self.rank_rows}"
            )
        _put(self.order[: len(plan.order)], plan.order)
        _put(self.tiles, plan.tiles + [[0, 0, 0]] * (len(self.tiles) - len(plan.tiles)))
        addresses = [[one.slots.data_ptr(), one.entries.data_ptr()] for one in plan.adapters]
        _put(self.adapters[: len(addresses)], addresses)
        _put(self.scalings[: len(addresses)], plan.scalings)
        self.keep[:] = plan.adapters


def _put(target: torch.Tensor, values: Sequence[object]) -> None:
    if not len(values):
        return
    source = torch.tensor(values, dtype=target.dtype)
    if target.is_cuda:
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)


@dataclass(frozen=True)
class _Plan:
    """Tiles, the batch's row of each grouped row, and the adapters in order of first appearance."""

    tiles: list[list[int]]
    order: list[int]
    adapters: list[Tables]
    scalings: list[float]


def _plan(batch: SegmentBatch, tables: TableSet, tile_rows: int) -> _Plan:
    plan = _Plan([], [], [], [])
    numbers: dict[int, int] = {}
    given = None if batch.order is None else batch.order.tolist()
    for segment in batch.segments:
        number = numbers.setdefault(id(segment.adapter), len(numbers))
        if number == len(plan.adapters):
            plan.adapters.append(tables.of(cast("PackedLike", segment.adapter)))
            plan.scalings.append(segment.scaling)
        first = len(plan.order)
        rows = range(segment.start, segment.stop)
        plan.order.extend(rows if given is None else [given[row] for row in rows])
        for start in range(first, len(plan.order), tile_rows):
            plan.tiles.append([number, start, min(tile_rows, len(plan.order) - start)])
    return plan
