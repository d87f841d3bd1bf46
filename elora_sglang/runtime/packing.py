"""Adapters in pool slots: write them, read them back, and see their matrices where they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from elora_sglang.runtime.layout import AdapterLayout, Piece
from elora_sglang.runtime.pool import UnifiedPool

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
        self._in_place: dict[tuple[int, str], ModuleWeights | None] = {}

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
                self.pool.byte_rows(index, stream).index_copy_(
                    0, self.slots[:used], image[:used].to(self.pool.device)
                )

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
        kept; one that is scattered is gathered by one ``index_select`` on every call.
        """
        key = (layer, name)
        if key in self._in_place:
            return self._in_place[key]
        pieces = self.layout.layers[layer].pieces_of(name)
        weights = self._assemble(layer, name, pieces) if pieces else None
        if all(self._is_run(piece) for piece in pieces):
            self._in_place[key] = weights
        return weights

    def _assemble(self, layer: int, name: str, pieces: tuple[Piece, ...]) -> ModuleWeights:
        shape = self.layout.layers[layer].module(name)
        assert shape is not None
        shrink: list[ShrinkPart] = []
        expand: list[ExpandPart] = []
        first_row = [0, 0]  # of each slice in the stacked LoRA-rank rows; index = matrix
        for part in shape.slices:
            first_row.append(first_row[-1] + part.rank)
        for piece in pieces:
            stored = self._stored(layer, piece)
            first = first_row[piece.matrix] + piece.row
            last = first + piece.rows
            if piece.matrix == 0:
                shrink.append(ShrinkPart(first, last, stored.t()))
            else:
                part = shape.slices[piece.matrix - 1]
                expand.append(ExpandPart(first, last, part.offset, part.offset + part.width, stored))
        return ModuleWeights(shape.rank_rows, tuple(shrink), tuple(expand))

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
            rows = self.pool.byte_rows(layer, piece.stream).index_select(0, self.slots[first : last + 1])
            data = rows.view(-1)[skip : skip + size]
        return data.view(self.dtype).view(piece.rows, piece.cols)


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
