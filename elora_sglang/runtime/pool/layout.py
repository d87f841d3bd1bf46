"""Byte layout of a LoRA adapter inside KV token slots (described for people in docs/byte-layout.md).

A slot has one K row and one V row per layer. The layer-l rows of an adapter's ``slots`` slots form
two byte streams: all K rows one after the other, and all V rows. Every matrix of layer l lies in one
of them, 16-byte aligned; at most one matrix per layer is cut in two at a LoRA-rank row, so that both
streams end nearly together and ``slots`` stays close to ``bytes / (K row + V row)``.

Pure arithmetic on shapes: the same shapes give the same layout in every process, and since all
tensor-parallel shards of a layer have equal shapes, all tp ranks need the same number of slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

#: Every matrix (and either part of a cut one) starts at a multiple of this many bytes in its stream.
ALIGNMENT = 16

#: A matrix is cut only if that saves at least this share of the adapter's slots: the part in the
#: other stream costs one more matrix product per forward.
CUT_WORTH = 1 / 32

K_STREAM, V_STREAM = 0, 1


@dataclass(frozen=True, slots=True)
class SliceShape:
    """One B matrix of a module: ``rank`` LoRA-rank rows of ``width`` outputs, first output ``offset``."""

    offset: int
    width: int
    rank: int


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """LoRA shapes of one linear module on one tp rank.

    ``slices`` are the parts of a fused module that the adapter has (q, k, v or gate, up): a part it
    lacks is simply not listed and takes no bytes. Matrix 0 is A ``[rank_rows, in_features]`` (the
    slices' A matrices one below the other); matrix ``1 + i`` is slice i's B, stored rank-major as
    ``[rank, width]``, so that one LoRA-rank row is contiguous on both sides.
    """

    name: str
    in_features: int
    slices: tuple[SliceShape, ...]

    @property
    def rank_rows(self) -> int:
        """Rows of A: the sum of the slices' LoRA ranks."""
        return sum(part.rank for part in self.slices)

    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of A and of each slice's B, as stored."""
        return ((self.rank_rows, self.in_features), *((part.rank, part.width) for part in self.slices))


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``[row, row + rows)`` of one stored matrix: ``rows * cols`` elements at byte ``offset``
    of ``stream`` (0: K rows, 1: V rows) of its layer."""

    module: str
    matrix: int
    row: int
    rows: int
    cols: int
    stream: int
    offset: int


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """Where the matrices of one layer lie. ``stream_bytes``: bytes used of the K and V stream."""

    modules: tuple[ModuleShape, ...]
    pieces: tuple[Piece, ...]
    stream_bytes: tuple[int, int]

    def module(self, name: str) -> ModuleShape | None:
        return next((m for m in self.modules if m.name == name), None)

    def pieces_of(self, name: str) -> tuple[Piece, ...]:
        """Pieces of one module, ordered by matrix, then row."""
        return tuple(p for p in self.pieces if p.module == name)


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Static table of one adapter shape: equal for every adapter with these shapes, on every tp rank.

    ``slots`` is a multiple of ``page_size`` and the same for all layers.
    """

    layers: tuple[LayerLayout, ...]
    itemsize: int
    row_bytes: tuple[int, int]
    page_size: int
    slots: int

    def table(self, layer: int) -> list[tuple[int, int, int, int, int, int, int]]:
        """Static table for kernels: (module index, matrix, first row, rows, columns, stream, byte offset).

        Row ``i`` of a piece starts at stream byte ``b = offset + i * columns * itemsize``, that is in
        slot ``slots[b // row_bytes[stream]]`` at byte ``b % row_bytes[stream]`` of its row.
        """
        order = {m.name: i for i, m in enumerate(self.layers[layer].modules)}
        return [
            (order[p.module], p.matrix, p.row, p.rows, p.cols, p.stream, p.offset)
            for p in self.layers[layer].pieces
        ]


@dataclass(frozen=True, slots=True)
class _Unit:
    """A run of matrix rows on its way into a stream."""

    module: str
    matrix: int
    row: int
    rows: int
    cols: int
    itemsize: int

    @property
    def size(self) -> int:
        return _aligned(self.rows * self.cols * self.itemsize)

    def cut(self, rows: int) -> tuple[_Unit, _Unit]:
        head = _Unit(self.module, self.matrix, self.row, rows, self.cols, self.itemsize)
        tail_row = self.row + rows
        tail = _Unit(self.module, self.matrix, tail_row, self.rows - rows, self.cols, self.itemsize)
        return head, tail


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def plan_adapter(
    layers: Iterable[Iterable[ModuleShape]], *, itemsize: int, row_bytes: tuple[int, int], page_size: int
) -> AdapterLayout:
    """Lay an adapter out for a pool.

    Args:
        layers: per layer the modules the adapter has there, with this tp rank's shapes; may be empty.
        itemsize: bytes per stored element.
        row_bytes: bytes of one K row and one V row of one slot.
        page_size: slots per page; the slot count is rounded up to whole pages.

    Returns:
        The layout; ``slots`` is 0 only for an adapter without any matrix.

    Raises:
        ValueError: a size is not positive, or a module name occurs twice in a layer.
    """
    return _plan(tuple(tuple(modules) for modules in layers), itemsize, row_bytes, page_size)


@lru_cache(maxsize=256)
def _plan(
    layers: tuple[tuple[ModuleShape, ...], ...], itemsize: int, row_bytes: tuple[int, int], page_size: int
) -> AdapterLayout:
    if min(itemsize, page_size, *row_bytes) < 1:
        raise ValueError(f"sizes must be positive: {itemsize=}, {row_bytes=}, {page_size=}")
    for index, modules in enumerate(layers):
        names = [m.name for m in modules]
        if len(set(names)) != len(names):
            raise ValueError(f"layer {index} names a module twice: {sorted(names)}")
        for module in modules:
            if min(module.in_features, *(n for s in module.slices for n in (s.width, s.rank))) < 1:
                raise ValueError(f"layer {index} {module.name}: every size must be positive, got {module}")
    whole = {modules: _whole_matrices(modules, itemsize, row_bytes) for modules in set(layers)}
    slots = _pages(max((_slots(place, row_bytes) for place in whole.values()), default=0), page_size)
    total = max((sum(sum(u.size for u in stream) for stream in p) for p in whole.values()), default=0)
    first = _pages(-(-total // sum(row_bytes)), page_size)
    chosen = whole
    for target in range(first, int(slots * (1 - CUT_WORTH)) + 1, page_size):
        fitted = {modules: _fit(place, target, row_bytes) for modules, place in whole.items()}
        if all(place is not None for place in fitted.values()):
            chosen = {modules: place for modules, place in fitted.items() if place is not None}
            slots = target
            break
    placed = {modules: _place(modules, streams) for modules, streams in chosen.items()}
    return AdapterLayout(tuple(placed[m] for m in layers), itemsize, row_bytes, page_size, slots)


_Streams = tuple[tuple[_Unit, ...], tuple[_Unit, ...]]


def _whole_matrices(modules: tuple[ModuleShape, ...], itemsize: int, row_bytes: tuple[int, int]) -> _Streams:
    """Longest first into the stream that then ends earlier: a classic near-optimal bipartition."""
    units = [
        _Unit(module.name, index, 0, rows, cols, itemsize)
        for module in modules
        for index, (rows, cols) in enumerate(module.matrices())
    ]
    streams: tuple[list[_Unit], list[_Unit]] = ([], [])
    fill = [0, 0]
    for unit in sorted(units, key=lambda u: -u.size):  # stable: ties keep module order
        ends = [(fill[s] + unit.size) / row_bytes[s] for s in (K_STREAM, V_STREAM)]
        stream = K_STREAM if ends[K_STREAM] <= ends[V_STREAM] else V_STREAM
        streams[stream].append(unit)
        fill[stream] += unit.size
    return tuple(streams[K_STREAM]), tuple(streams[V_STREAM])


def _fit(streams: _Streams, slots: int, row_bytes: tuple[int, int]) -> _Streams | None:
    """Streams that fit into ``slots`` with at most one matrix cut, or None."""
    fill = [sum(u.size for u in stream) for stream in streams]
    over = [fill[s] - slots * row_bytes[s] for s in (K_STREAM, V_STREAM)]
    if max(over) <= 0:
        return streams
    full = K_STREAM if over[K_STREAM] > 0 else V_STREAM
    room = -over[1 - full]
    for unit in sorted(streams[full], key=lambda u: -u.size):
        row_size = unit.cols * unit.itemsize
        for rows in (-(-over[full] // row_size), -(-over[full] // row_size) + 1):
            if not 0 < rows < unit.rows:
                continue
            kept, moved = unit.cut(unit.rows - rows)
            if moved.size <= room and unit.size - kept.size >= over[full]:
                rest = (*(u for u in streams[full] if u is not unit), kept)
                other = (*streams[1 - full], moved)
                return (rest, other) if full == K_STREAM else (other, rest)
    return None


def _slots(streams: _Streams, row_bytes: tuple[int, int]) -> int:
    return max(
        -(-sum(u.size for u in stream) // size) for stream, size in zip(streams, row_bytes, strict=True)
    )


def _pages(slots: int, page_size: int) -> int:
    return -(-slots // page_size) * page_size


def _place(modules: tuple[ModuleShape, ...], streams: _Streams) -> LayerLayout:
    """Byte offsets: within a stream in module order, so that a module's matrices lie together."""
    order = {m.name: i for i, m in enumerate(modules)}
    pieces: list[Piece] = []
    used = [0, 0]
    for stream, units in enumerate(streams):
        for unit in sorted(units, key=lambda u: (order[u.module], u.matrix, u.row)):
            pieces.append(
                Piece(unit.module, unit.matrix, unit.row, unit.rows, unit.cols, stream, used[stream])
            )
            used[stream] += unit.size
    pieces.sort(key=lambda p: (order[p.module], p.matrix, p.row))
    return LayerLayout(modules, tuple(pieces), (used[K_STREAM], used[V_STREAM]))
