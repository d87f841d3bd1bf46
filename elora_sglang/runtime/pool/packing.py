"""Adapters in pool slots: write them, read them back, and see their matrices where they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from elora_sglang.runtime.pool.layout import AdapterLayout, Piece
from elora_sglang.runtime.pool.views import UnifiedPool

#: Matrices of one layer: (module name, matrix index) -> tensor as in :class:`ModuleShape`,
#: A ``[rank_rows, in]``, B of slice i ``[rank, width]``, any dtype, on the CPU or the pool's device.
LayerMatrices = Mapping[tuple[str, int], torch.Tensor]


class ShrinkPart(NamedTuple):
    """Rows ``[first, last)`` of a module's A; ``weight`` is A transposed, ``[in, last - first]``."""

    first: int
    last: int
    weight: torch.Tensor


class ExpandPart(NamedTuple):
    """LoRA-rank rows ``[first, last)`` times ``weight`` ``[last - first, width]`` is added to the
    output columns ``[out_first, out_last)``."""

    first: int
    last: int
    out_first: int
    out_last: int
    weight: torch.Tensor


class ModuleWeights(NamedTuple):
    """One adapter's matrices of one module, as the kernels take them. ``rank_rows``: rows of A."""

    rank_rows: int
    shrink: tuple[ShrinkPart, ...]
    expand: tuple[ExpandPart, ...]


class PackedAdapter:
    """One adapter in its slots. Cheap to make; holds views of the pool, never a copy of weights.

    Args:
        pool: the bound pool.
        layout: its layout; must have been planned for this pool's row sizes.
        slots: the adapter's slots, int64 ``[layout.slots]``, any order. Stream byte b lies in the
            b // row_bytes-th *smallest* slot: ascending order turns most lists into long runs.
        dtype: stored type.

    Raises:
        ValueError: wrong number of slots, a duplicate, a slot outside the pool, or torn pages.
    """

    def __init__(
        self, pool: UnifiedPool, layout: AdapterLayout, slots: torch.Tensor, dtype: torch.dtype
    ) -> None:
        self.pool = pool
        self.layout = layout
        self.dtype = dtype
        self.slots = slots.to(device=pool.device, dtype=torch.int64).sort().values
        host = self.slots.cpu()
        _check_slots(host, pool, layout)
        self._first_slot: list[int] = host.tolist()
        steps = torch.ones_like(host)
        if host.numel():
            steps[0] = 0
            steps[1:] = (host[1:] - host[:-1]) != 1
        #: number of the run of consecutive slots that each slot belongs to
        self._run: list[int] = steps.cumsum(0).tolist()
        self._modules: dict[tuple[int, str], ModuleWeights | _Scattered | None] = {}

    def write(self, matrices: Callable[[int], LayerMatrices]) -> None:
        """Write the weights of all layers into the pool, cast to the stored type. Mutates the pool.

        Args:
            matrices: gives the matrices of a layer; called once per layer.

        Raises:
            ValueError: a matrix is missing or has another shape than the layout says. Slots may then
                hold part of the adapter; the caller must not use them.
        """
        images = [torch.zeros((self.layout.slots, size), dtype=torch.uint8) for size in self.pool.row_bytes]
        for index, layer in enumerate(self.layout.layers):
            if not layer.pieces:
                continue
            sources = matrices(index)
            for piece in layer.pieces:
                source = sources.get((piece.module, piece.matrix))
                rows, cols = layer.module(piece.module).matrices()[piece.matrix]  # type: ignore[union-attr]
                if source is None or source.shape != (rows, cols):
                    found = "nothing" if source is None else tuple(source.shape)
                    raise ValueError(
                        f"layer {index} {piece.module} matrix {piece.matrix}: "
                        f"the layout has ({rows}, {cols}), the adapter has {found}"
                    )
                size = piece.rows * piece.cols * self.layout.itemsize
                image = images[piece.stream].view(-1)[piece.offset : piece.offset + size]
                image.view(self.dtype).view(piece.rows, piece.cols).copy_(
                    source[piece.row : piece.row + piece.rows]
                )
            for stream, image in enumerate(images):
                used = -(-layer.stream_bytes[stream] // self.pool.row_bytes[stream])
                words = image[:used].view(torch.int64).to(self.pool.device)
                self.pool.word_rows(index, stream).index_copy_(0, self.slots[:used], words)

    def read(self) -> list[dict[tuple[str, int], torch.Tensor]]:
        """The stored matrices of all layers, copied out of the pool; keys as in :data:`LayerMatrices`."""
        found: list[dict[tuple[str, int], torch.Tensor]] = []
        for index, layer in enumerate(self.layout.layers):
            parts: dict[tuple[str, int], list[torch.Tensor]] = {}
            for piece in layer.pieces:  # ordered by row within a matrix
                parts.setdefault((piece.module, piece.matrix), []).append(self._stored(index, piece))
            found.append({key: torch.cat(pieces) for key, pieces in parts.items()})
        return found

    def module(self, layer: int, name: str) -> ModuleWeights | None:
        """The matrices of one module as the kernels take them; None when the adapter has none there.

        A matrix whose slots are one run of consecutive slots is a view of the pool, found once and
        kept; scattered ones are gathered on every call, by one ``index_select`` per stream.
        """
        key = (layer, name)
        if key not in self._modules:
            self._modules[key] = self._resolve(layer, name)
        found = self._modules[key]
        return found.gather() if isinstance(found, _Scattered) else found

    def _resolve(self, layer: int, name: str) -> ModuleWeights | _Scattered | None:
        shape = self.layout.layers[layer].module(name)
        if shape is None:
            return None
        pieces = self.layout.layers[layer].pieces_of(name)
        first_row = [0, 0]  # by matrix: where its LoRA-rank rows begin among the stacked ones
        for part in shape.slices:
            first_row.append(first_row[-1] + part.rank)
        sources: list[tuple[torch.Tensor, torch.Tensor]] = []
        source_of: dict[int, tuple[int, int]] = {}  # stream -> (index into sources, first byte there)
        for stream in (0, 1):
            apart = [p for p in pieces if p.stream == stream and not self._is_run(p)]
            if apart:
                first, last = self._span(apart[0])[0], self._span(apart[-1])[1]
                source_of[stream] = (len(sources), first * self.pool.row_bytes[stream])
                sources.append((self.pool.word_rows(layer, stream), self.slots[first : last + 1]))
        shrink: list[tuple[ShrinkPart, _Place]] = []
        expand: list[tuple[ExpandPart, _Place]] = []
        for piece in pieces:
            size, stride = (piece.rows, piece.cols), (piece.cols, 1)
            if piece.matrix == 0:
                size, stride = size[::-1], stride[::-1]
            if self._is_run(piece):
                place, stored = None, self._stored(layer, piece)
                weight = stored.t() if piece.matrix == 0 else stored
            else:
                source, start = source_of[piece.stream]
                place = (source, size, stride, (piece.offset - start) // self.layout.itemsize)
                weight = _NOTHING
            first = first_row[piece.matrix] + piece.row
            if piece.matrix == 0:
                shrink.append((ShrinkPart(first, first + piece.rows, weight), place))
            else:
                part = shape.slices[piece.matrix - 1]
                edges = (first, first + piece.rows, part.offset, part.offset + part.width)
                expand.append((ExpandPart(*edges, weight), place))
        if sources:
            return _Scattered(shape.rank_rows, self.dtype, sources, shrink, expand)
        return ModuleWeights(shape.rank_rows, tuple(p for p, _ in shrink), tuple(p for p, _ in expand))

    def _span(self, piece: Piece) -> tuple[int, int]:
        """First and last index into ``slots`` that the piece touches."""
        row = self.pool.row_bytes[piece.stream]
        end = piece.offset + piece.rows * piece.cols * self.layout.itemsize - 1
        return piece.offset // row, end // row

    def _is_run(self, piece: Piece) -> bool:
        first, last = self._span(piece)
        return self._run[first] == self._run[last]

    def _stored(self, layer: int, piece: Piece) -> torch.Tensor:
        """``[rows, cols]`` of one piece: a view of the pool if its slots are consecutive, else a copy."""
        row = self.pool.row_bytes[piece.stream]
        size = piece.rows * piece.cols * self.layout.itemsize
        first, last = self._span(piece)
        skip = piece.offset - first * row
        if self._run[first] == self._run[last]:
            data = self.pool.byte_run(layer, piece.stream, self._first_slot[first], skip, size)
        else:
            words = self.pool.word_rows(layer, piece.stream).index_select(0, self.slots[first : last + 1])
            data = words.view(torch.uint8).view(-1)[skip : skip + size]
        return data.view(self.dtype).view(piece.rows, piece.cols)


#: Where a gathered matrix lies: (source, size, stride, first element), or None for one that is in place.
_Place = tuple[int, tuple[int, int], tuple[int, int], int] | None

_NOTHING = torch.empty(0)


class _Scattered:
    """A module whose matrices do not all lie in consecutive slots: what to gather, and how to see it."""

    def __init__(
        self,
        rank_rows: int,
        dtype: torch.dtype,
        sources: list[tuple[torch.Tensor, torch.Tensor]],
        shrink: list[tuple[ShrinkPart, _Place]],
        expand: list[tuple[ExpandPart, _Place]],
    ) -> None:
        self._rank_rows, self._dtype, self._sources = rank_rows, dtype, sources
        self._shrink, self._expand = shrink, expand

    def gather(self) -> ModuleWeights:
        """Copy the scattered rows together: one ``index_select`` per stream. The result owns its memory."""
        rows = [words.index_select(0, slots).view(self._dtype) for words, slots in self._sources]
        return ModuleWeights(
            self._rank_rows,
            tuple(
                part if at is None else ShrinkPart(*part[:2], rows[at[0]].as_strided(*at[1:]))
                for part, at in self._shrink
            ),
            tuple(
                part if at is None else ExpandPart(*part[:4], rows[at[0]].as_strided(*at[1:]))
                for part, at in self._expand
            ),
        )


def _check_slots(slots: torch.Tensor, pool: UnifiedPool, layout: AdapterLayout) -> None:
    """Raise ValueError unless ``slots`` (sorted, on the CPU) can hold the adapter."""
    if layout.row_bytes != pool.row_bytes or len(layout.layers) != pool.num_layers:
        raise ValueError(
            f"the layout is for {len(layout.layers)} layers with rows of {layout.row_bytes} bytes, "
            f"the pool has {pool.num_layers} with {pool.row_bytes}"
        )
    if slots.numel() != layout.slots:
        raise ValueError(f"the adapter needs {layout.slots} slots, got {slots.numel()}")
    if not slots.numel():
        return
    if int(slots[0]) < 0 or int(slots[-1]) >= pool.rows:
        raise ValueError(f"slots {int(slots[0])}..{int(slots[-1])} are outside the pool of {pool.rows}")
    if bool((slots[1:] == slots[:-1]).any()):
        raise ValueError("a slot occurs twice in the adapter's slots")
    page = pool.page_size
    starts = slots[::page]
    if bool((starts % page != 0).any()) or not torch.equal(
        slots, (starts[:, None] + torch.arange(page)).flatten()
    ):
        raise ValueError(f"the adapter's slots are not whole pages of {page}")
