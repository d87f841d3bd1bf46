"""Random inputs for tests and benchmarks of the paged LoRA kernels: adapters that really lie in a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from elora_sglang.kernels.paged_lora.segments import SegmentBatch, plan_segments
from elora_sglang.runtime.layout import ModuleShape, SliceShape, plan_adapter
from elora_sglang.runtime.packing import PackedAdapter
from elora_sglang.runtime.pool import UnifiedPool

MODULE = "module"


@dataclass
class Inputs:
    """One module of one layer, a pool with adapters in it, and a batch.

    ``matrices[i]``: adapter i's A ``[rank_rows, in]`` and its B ``[rank, width]`` per slice, the
    originals. ``rows``: (adapter index or None for the base model, rows) per request, in batch order.
    """

    x: torch.Tensor
    out: torch.Tensor
    adapters: list[PackedAdapter]
    matrices: list[list[torch.Tensor]]
    shapes: list[ModuleShape]
    scalings: list[float]
    rows: list[tuple[int | None, int]]
    layer: int = 0
    module: str = MODULE

    def batch(self) -> SegmentBatch:
        """Segments as the LoRA backend would plan them; index 0 is the base model."""
        return plan_segments(
            [count for _, count in self.rows],
            [0 if index is None else index + 1 for index, _ in self.rows],
            [None, *self.adapters],
            [0.0, *self.scalings],
            self.x.device,
        )

    def expected(self) -> torch.Tensor:
        """``out + LoRA(x)`` in float64, request by request, from the original matrices."""
        result = self.out.double()
        row = 0
        for index, count in self.rows:
            if index is not None:
                a, *bs = (m.double() for m in self.matrices[index])
                h = self.scalings[index] * self.x[row : row + count].double() @ a.t()
                first = 0
                for part, b in zip(self.shapes[index].slices, bs, strict=True):
                    columns = slice(part.offset, part.offset + part.width)
                    result[row : row + count, columns] += h[:, first : first + part.rank] @ b
                    first += part.rank
            row += count
        return result


def make_inputs(
    *,
    seed: int,
    ranks: Sequence[int | Sequence[int]],
    rows: Sequence[tuple[int | None, int]],
    in_features: int = 64,
    widths: Sequence[int] = (64,),
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype = torch.float32,
    kv_row: tuple[int, int] = (2, 16),
    page_size: int = 1,
    scattered: bool = False,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Build a pool, put one adapter per entry of ``ranks`` in it, and make a batch.

    Args:
        ranks: LoRA rank of each adapter, or one per slice (0: the adapter lacks it).
        rows: (adapter index or None, rows) per request.
        widths: output features of each slice of the module.
        kv_row: (heads, head_dim) of a KV row.
        scattered: put adapters into random pages instead of consecutive ones.
    """
    generator = torch.Generator().manual_seed(seed)
    store = torch.uint8 if kv_dtype.itemsize == 1 else kv_dtype
    row_bytes = kv_row[0] * kv_row[1] * store.itemsize
    shapes: list[ModuleShape] = []
    for rank in ranks:
        per_slice = [rank] * len(widths) if isinstance(rank, int) else list(rank)
        offsets = [sum(widths[:i]) for i in range(len(widths))]
        parts = zip(offsets, widths, per_slice, strict=True)
        shapes.append(ModuleShape(MODULE, in_features, tuple(SliceShape(o, w, r) for o, w, r in parts if r)))
    layouts = [
        plan_adapter([[s]], itemsize=dtype.itemsize, row_bytes=(row_bytes, row_bytes), page_size=page_size)
        for s in shapes
    ]
    pages = [layout.slots // page_size for layout in layouts]
    total = sum(pages) + 4
    buffer = torch.zeros((2, (total + 1) * page_size, *kv_row), dtype=store)
    buffer.view(torch.uint8).random_(generator=generator)
    buffer = buffer.to(device)
    pool = UnifiedPool([buffer[0]], [buffer[1]], page_size=page_size)
    free = 1 + (torch.randperm(total, generator=generator) if scattered else torch.arange(total))
    adapters, matrices = [], []
    for shape, layout, count in zip(shapes, layouts, pages, strict=True):
        taken, free = free[:count], free[count:]
        slots = (taken[:, None] * page_size + torch.arange(page_size)).flatten()
        own = [
            (torch.randn(r, c, generator=generator) / max(r, c) ** 0.5).to(dtype) for r, c in shape.matrices()
        ]
        adapter = PackedAdapter(pool, layout, slots, dtype)
        adapter.write(lambda _, own=own: {(MODULE, i): m for i, m in enumerate(own)})  # type: ignore[misc]
        adapters.append(adapter)
        matrices.append([m.to(device) for m in own])
    count = sum(n for _, n in rows)
    x = torch.randn(count, in_features, generator=generator).to(dtype).to(device)
    out = torch.randn(count, sum(widths), generator=generator).to(dtype).to(device)
    scalings = [0.5 + 0.25 * i for i in range(len(ranks))]
    return Inputs(x, out, adapters, matrices, shapes, scalings, list(rows))
