"""Paged LoRA shrink and expand in Triton.

A tile is up to ``tile_rows`` rows of one adapter, so its weights are read once for all of them. Addresses are found
per 16 bytes: the element's place in the adapter's stream says which slot, and the slot says where. Only rows that the
adapter has are read; tiles without rows and LoRA-rank blocks beyond the adapter's end at once. No atomics: sums are
taken in a fixed order, the same input gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from elora_sglang.kernels.paged_lora.tables import EXPAND, FIELDS, SHRINK, STRIDE, DeviceBatch, vector

_FIELDS, _SHRINK, _EXPAND = tl.constexpr(FIELDS), tl.constexpr(SHRINK), tl.constexpr(EXPAND)


@dataclass(frozen=True)
class Config:
    """Sizes of the kernels' blocks.

    Attributes:
        rank_block: LoRA-rank rows at a time, 16 or more.
        in_block, out_block: input features (shrink) and output features (expand) at a time.
        splits: programs that share a tile's input features; their sums are added in order by ``expand``.
        warps: of a program.
        stages: of the load pipeline.
    """

    rank_block: int = 16
    in_block: int = 128
    out_block: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Place:
    """One module of one layer.

    Attributes:
        k, v: the layer's buffers as rows of stored elements: ``[slots, elements of a row]``, contiguous.
        module: its number in the entry tables' second dimension, and how many there are.
        layer: number of the layer.
        widths: output features of the module's parts (q, k, v), in order.
    """

    k: torch.Tensor
    v: torch.Tensor
    layer: int
    module: int
    modules: int
    widths: tuple[int, ...]

    @property
    def entry(self) -> int:
        """Where its entries begin, in numbers."""
        return (self.layer * self.modules + self.module) * STRIDE

    @property
    def between(self) -> int:
        """Elements from the K buffer to the V buffer: both are reached from one address."""
        return (self.v.data_ptr() - self.k.data_ptr()) // self.k.element_size()


@triton.jit
def _weights(
    pool, between, slots, stream, element, ok, K_ROW: tl.constexpr, V_ROW: tl.constexpr, VEC: tl.constexpr
):
    """``[rows, units * VEC]`` of the stored elements that begin at ``element`` ``[rows, units]``, VEC from each."""
    if K_ROW == V_ROW:
        slot_index = element // K_ROW
        inside = element % K_ROW
        row = K_ROW
    else:
        row = tl.where(stream == 0, K_ROW, V_ROW)
        slot_index = element // row
        inside = element % row
    slot = tl.load(slots + slot_index, mask=ok, other=0).to(tl.int64)
    start = slot * row + inside + tl.where(stream == 0, 0, between)
    start = tl.multiple_of(start, [VEC, VEC])
    pointers = pool + start[:, :, None] + tl.arange(0, VEC)[None, None, :]
    found = tl.load(pointers, mask=ok[:, :, None], other=0.0)
    return tl.reshape(found, [element.shape[0], element.shape[1] * VEC])


@triton.jit(do_not_specialize=["place"])
def _shrink(
    x, x_stride, h, h_split, h_stride, pool, between, order, tiles, adapters, place,
    COLS: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``h[split, grouped row, LoRA-rank row] = A @ x`` over the split's share of the input features."""
    tile = tl.program_id(0)
    rows = tl.load(tiles + 3 * tile + 2)
    if rows == 0:
        return
    adapter = tl.load(tiles + 3 * tile)
    first = tl.load(tiles + 3 * tile + 1)
    slots = tl.load(adapters + 2 * adapter).to(tl.pointer_type(tl.int32))
    entry = tl.load(adapters + 2 * adapter + 1).to(tl.pointer_type(tl.int32)) + place
    upper = tl.load(entry + 3)
    rank_rows = upper + tl.load(entry + _FIELDS + 3)
    rank = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    if tl.program_id(1) * RANKS >= rank_rows:
        return
    # A lies in one piece, or in two: rows [0, upper) and the others.
    below = rank >= upper
    stream = tl.where(below, tl.load(entry + _FIELDS), tl.load(entry))
    element = tl.where(below, tl.load(entry + _FIELDS + 1) - upper * COLS, tl.load(entry + 1)) + rank * COLS
    row = tl.arange(0, ROWS)
    row_ok = row < rows
    token = tl.load(order + first + row, mask=row_ok, other=0)
    sums = tl.zeros([ROWS, RANKS], dtype=tl.float32)
    SPAN: tl.constexpr = ((COLS + BLOCK * SPLITS - 1) // (BLOCK * SPLITS)) * BLOCK
    split = tl.program_id(2)
    for block in range(split * SPAN, tl.minimum((split + 1) * SPAN, COLS), BLOCK):
        column = block + tl.arange(0, BLOCK)
        values = tl.load(
            x + token[:, None] * x_stride + column[None, :],
            mask=row_ok[:, None] & (column < COLS)[None, :],
            other=0.0,
        )
        unit = block + tl.arange(0, BLOCK // VEC) * VEC
        ok = (rank < rank_rows)[:, None] & (unit < COLS)[None, :]
        a = _weights(
            pool, between, slots, stream[:, None], element[:, None] + unit[None, :], ok, K_ROW, V_ROW, VEC
        )
        a = a.to(values.dtype)
        if WIDE:
            values, a = values.to(tl.float32), a.to(tl.float32)
        sums = tl.dot(values, tl.trans(a), sums, input_precision="ieee")
    target = h + split * h_split + (first + row)[:, None] * h_stride + rank[None, :]
    tl.store(target, sums, mask=row_ok[:, None] & (rank < rank_rows)[None, :])


@triton.jit(do_not_specialize=["place"])
def _expand(
    h, h_split, h_stride, out, out_stride, pool, between, order, tiles, adapters, scalings, place,
    COLS: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``out[row] += scaling * B @ h[grouped row]`` for a block of output columns."""
    tile = tl.program_id(0)
    rows = tl.load(tiles + 3 * tile + 2)
    if rows == 0:
        return
    adapter = tl.load(tiles + 3 * tile)
    first = tl.load(tiles + 3 * tile + 1)
    slots = tl.load(adapters + 2 * adapter).to(tl.pointer_type(tl.int32))
    entry = tl.load(adapters + 2 * adapter + 1).to(tl.pointer_type(tl.int32)) + place
    begin = tl.program_id(1) * BLOCK
    row = tl.arange(0, ROWS)
    row_ok = row < rows
    sums = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    touched = 0
    for number in range(_SHRINK, _SHRINK + _EXPAND):
        piece = entry + number * _FIELDS
        piece_rows = tl.load(piece + 3)
        left = tl.load(piece + 4)
        width = tl.load(piece + 5)
        if (piece_rows > 0) & (left < begin + BLOCK) & (left + width > begin):
            touched = 1
            stream = tl.load(piece)
            above = tl.load(piece + 2)
            unit = begin - left + tl.arange(0, BLOCK // VEC) * VEC
            unit_ok = (unit >= 0) & (unit < width)
            for start in range(0, piece_rows, RANKS):
                rank = start + tl.arange(0, RANKS)
                rank_ok = rank < piece_rows
                source = h + (first + row)[:, None] * h_stride + (above + rank)[None, :]
                h_ok = row_ok[:, None] & rank_ok[None, :]
                shrunk = tl.load(source, mask=h_ok, other=0.0)
                for split in range(1, SPLITS):
                    shrunk += tl.load(source + split * h_split, mask=h_ok, other=0.0)
                b = _weights(
                    pool, between, slots, stream, tl.load(piece + 1) + rank[:, None] * width + unit[None, :],
                    rank_ok[:, None] & unit_ok[None, :], K_ROW, V_ROW, VEC,
                )  # fmt: skip
                kind = out.dtype.element_ty
                shrunk, b = shrunk.to(kind), b.to(kind)
                if WIDE:
                    shrunk, b = shrunk.to(tl.float32), b.to(tl.float32)
                sums = tl.dot(shrunk, b, sums, input_precision="ieee")
    if touched == 1:
        token = tl.load(order + first + row, mask=row_ok, other=0)
        column = begin + tl.arange(0, BLOCK)
        target = out + token[:, None] * out_stride + column[None, :]
        ok = row_ok[:, None] & (column < COLS)[None, :]
        before = tl.load(target, mask=ok, other=0.0).to(tl.float32)
        tl.store(target, (before + tl.load(scalings + adapter) * sums).to(out.dtype.element_ty), mask=ok)


def shrink_into(x: torch.Tensor, h: torch.Tensor, batch: DeviceBatch, place: Place, config: Config) -> None:
    """Write ``A @ x`` of every grouped row.

    Args:
        x: ``[rows, in_features]``, activation dtype, last dimension contiguous.
        h: float32 ``[splits, grouped rows, LoRA-rank rows]``, contiguous; only what an adapter has is written.
    """
    columns = x.shape[1]
    vec = vector(place.k.element_size(), columns, place.k.shape[1], place.v.shape[1])
    most = min(batch.rank_rows, batch.rank * len(place.widths))  # modules with fewer parts have fewer rows
    grid = (len(batch.tiles), triton.cdiv(most, config.rank_block), config.splits)
    _shrink[grid](
        x, x.stride(0), h, h.stride(0), h.stride(1), place.k, place.between,
        batch.order, batch.tiles, batch.adapters, place.entry,
        COLS=columns, K_ROW=place.k.shape[1], V_ROW=place.v.shape[1], VEC=vec,
        ROWS=batch.tile_rows, RANKS=config.rank_block, BLOCK=config.in_block, SPLITS=config.splits, WIDE=_wide(x),
        **_launch(config),
    )  # fmt: skip


def expand_from(h: torch.Tensor, out: torch.Tensor, batch: DeviceBatch, place: Place, config: Config) -> None:
    """``out += scaling * B @ h``; ``h`` as :func:`shrink_into` leaves it. Mutates ``out`` ``[rows, out_features]``."""
    edges = [sum(place.widths[:part]) for part in range(1, len(place.widths) + 1)]
    vec = vector(place.k.element_size(), *edges, *place.widths, place.k.shape[1], place.v.shape[1])
    grid = (len(batch.tiles), triton.cdiv(out.shape[1], config.out_block))
    _expand[grid](
        h, h.stride(0), h.stride(1), out, out.stride(0), place.k, place.between,
        batch.order, batch.tiles, batch.adapters, batch.scalings, place.entry,
        COLS=out.shape[1], K_ROW=place.k.shape[1], V_ROW=place.v.shape[1], VEC=vec,
        ROWS=batch.tile_rows, RANKS=config.rank_block, BLOCK=config.out_block, SPLITS=h.shape[0], WIDE=_wide(out),
        **_launch(config),
    )  # fmt: skip


def add_lora(
    x: torch.Tensor,
    out: torch.Tensor,
    batch: DeviceBatch,
    place: Place,
    config: Config,
    h: torch.Tensor | None = None,
) -> torch.Tensor:
    """``out += LoRA(x)``; changes and returns ``out``.

    ``h``: float32 ``[splits, grouped rows, LoRA-rank rows]`` to work in, any content; made here where it is missing.
    """
    if h is None:
        size = (config.splits, len(batch.order), batch.rank_rows)
        h = torch.empty(size, dtype=torch.float32, device=x.device)
    shrink_into(x, h, batch, place, config)
    expand_from(h, out, batch, place, config)
    return out


def _wide(like: torch.Tensor) -> bool:
    """Whether products are taken in float32: Triton's interpreter keeps bfloat16 as bits and would multiply those."""
    return like.dtype == torch.bfloat16 and not like.is_cuda


def _launch(config: Config) -> dict[str, Any]:
    return {"num_warps": config.warps, "num_stages": config.stages}
