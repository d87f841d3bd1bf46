"""A small device pool in every dtype, and an adapter to pack into it."""

from __future__ import annotations

import torch

from elora_sglang.runtime.pool.layout import AdapterLayout, ModuleShape, SliceShape, plan_adapter
from elora_sglang.runtime.pool.views import UnifiedPool

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KV_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.uint8]  # SGLang keeps fp8 as uint8
LAYERS = 2

SHAPES = (
    ModuleShape("qkv_proj", 48, (SliceShape(0, 64, 12), SliceShape(80, 16, 5))),
    ModuleShape("o_proj", 64, (SliceShape(0, 48, 1),)),
)


def make_pool(kv_dtype: torch.dtype, page_size: int, slots: int = 1024) -> UnifiedPool:
    """K and V as halves of one tensor per layer, full of random bytes, like a pool in use."""
    generator = torch.Generator().manual_seed(0)
    fused = [torch.zeros((2, slots + page_size, 2, 16), dtype=kv_dtype) for _ in range(LAYERS)]
    for buffer in fused:
        buffer.view(torch.uint8).random_(generator=generator)
    return UnifiedPool([b[0] for b in fused], [b[1] for b in fused], page_size=page_size)


def make_layout(pool: UnifiedPool, dtype: torch.dtype) -> AdapterLayout:
    return plan_adapter(
        [SHAPES] * LAYERS, itemsize=dtype.itemsize, row_bytes=pool.row_bytes, page_size=pool.page_size
    )


def make_matrices(dtype: torch.dtype, seed: int = 1) -> list[dict[tuple[str, int], torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            (shape.name, index): torch.randn(size, generator=generator).to(dtype)
            for shape in SHAPES
            for index, size in enumerate(shape.matrices())
        }
        for _ in range(LAYERS)
    ]


def walk(
    pool: UnifiedPool, layout: AdapterLayout, slots: torch.Tensor, dtype: torch.dtype, layer: int
) -> dict:  # type: ignore[type-arg]
    """Read an adapter by the documented addressing, byte by byte, without the code under test."""
    ascending = sorted(slots.tolist())
    found: dict[tuple[str, int], list[list[int]]] = {}
    for module, matrix, _, rows, cols, stream, offset in layout.table(layer):
        name, row_bytes = layout.layers[layer].modules[module].name, layout.row_bytes[stream]
        buffer = pool.byte_rows(layer, stream)
        for row in range(rows):
            start = offset + row * cols * layout.itemsize
            data = [
                int(buffer[ascending[b // row_bytes], b % row_bytes])
                for b in range(start, start + cols * layout.itemsize)
            ]
            found.setdefault((name, matrix), []).append(data)
    return {key: torch.tensor(rows, dtype=torch.uint8).view(dtype) for key, rows in found.items()}
