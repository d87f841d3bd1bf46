"""Paged LoRA in plain PyTorch: one matrix product per segment and matrix, none per token."""

from __future__ import annotations

from typing import Any

import torch

from elora_sglang.kernels.paged_lora.segments import Segment, SegmentBatch


def add_lora(
    x: torch.Tensor, out: torch.Tensor, batch: SegmentBatch, layer: int, module: str
) -> torch.Tensor:
    """``out += LoRA(x)`` for all active segments; changes and returns ``out``."""
    work = _work(batch, layer, module)
    if not work:
        return out
    rows_in, rows_out = _grouped(x, batch), _grouped(out, batch)
    for segment, weights in work:
        inputs = rows_in[segment.start : segment.stop]
        if len(weights.shrink) == 1:
            h = torch.mm(inputs, _cast(weights.shrink[0].weight, x))
        else:
            h = x.new_empty((inputs.shape[0], weights.rank_rows))
            _shrink_into(inputs, h, weights)
        _expand_into(h, rows_out[segment.start : segment.stop], weights, segment.scaling)
    return _scatter(out, rows_out, batch)


def shrink(x: torch.Tensor, batch: SegmentBatch, layer: int, module: str) -> torch.Tensor:
    """``A @ x`` per row: ``[active rows or T, R]``, zero where a row has fewer (or no) LoRA-rank rows.

    R and the row order depend on the batch only, so the result can be all-reduced across tp ranks.
    """
    work = _work(batch, layer, module)
    rows_in = _grouped(x, batch)
    width = max((weights.rank_rows for _, weights in work), default=0)
    h = x.new_zeros((rows_in.shape[0], width))
    for segment, weights in work:
        _shrink_into(rows_in[segment.start : segment.stop], h[segment.start : segment.stop], weights)
    return h


def expand(h: torch.Tensor, out: torch.Tensor, batch: SegmentBatch, layer: int, module: str) -> torch.Tensor:
    """``out += scaling * B @ h`` with ``h`` from :func:`shrink`; changes and returns ``out``."""
    work = _work(batch, layer, module)
    if not work:
        return out
    rows_out = _grouped(out, batch)
    for segment, weights in work:
        rows = slice(segment.start, segment.stop)
        _expand_into(h[rows], rows_out[rows], weights, segment.scaling)
    return _scatter(out, rows_out, batch)


def _work(batch: SegmentBatch, layer: int, module: str) -> list[tuple[Segment, Any]]:
    """Segments whose adapter touches this module, with its matrices there."""
    found = [(segment, segment.adapter.module(layer, module)) for segment in batch.segments]
    return [(segment, weights) for segment, weights in found if weights is not None]


def _shrink_into(x: torch.Tensor, h: torch.Tensor, weights: Any) -> None:
    for part in weights.shrink:
        h[:, part.first : part.last] = torch.mm(x, _cast(part.weight, x))


def _expand_into(h: torch.Tensor, out: torch.Tensor, weights: Any, scaling: float) -> None:
    for part in weights.expand:
        columns = out[:, part.out_first : part.out_last]
        columns.addmm_(h[:, part.first : part.last], _cast(part.weight, h), alpha=scaling)


def _cast(weight: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # Compute in the activation's dtype, as SGLang's own backends do; usually the stored dtype already.
    return weight if weight.dtype == like.dtype else weight.to(like.dtype)


def _grouped(rows: torch.Tensor, batch: SegmentBatch) -> torch.Tensor:
    return rows if batch.order is None else rows.index_select(0, batch.order)


def _scatter(out: torch.Tensor, rows: torch.Tensor, batch: SegmentBatch) -> torch.Tensor:
    return out if batch.order is None else out.index_copy_(0, batch.order, rows)
