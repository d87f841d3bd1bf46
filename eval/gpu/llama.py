"""Shapes of Llama-3-8B on one GPU, and a pool full of adapters for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elora_sglang.eval.gpu.cases.paged_lora import packed, place
from elora_sglang.kernels.paged_lora.tables import TableSet
from elora_sglang.kernels.paged_lora.triton_kernel import Place
from elora_sglang.runtime.pool.layout import AdapterLayout, ModuleShape, SliceShape, plan_adapter
from elora_sglang.runtime.pool.views import UnifiedPool


@dataclass(frozen=True)
class Module:
    """One linear module: input features, and output features of each part."""

    name: str
    in_features: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """A model. ``kv_row``: (KV heads, head size)."""

    modules: tuple[Module, ...]
    layers: int
    kv_row: tuple[int, int]
    heads: int
    hidden: int
    vocab: int


def _llama(hidden: int, ffn: int, kv_row: tuple[int, int], *, layers: int, heads: int, vocab: int) -> Shape:
    kv = kv_row[0] * kv_row[1]
    modules = (
        Module("down_proj", ffn, (hidden,)), Module("gate_up_proj", hidden, (ffn, ffn)),
        Module("o_proj", hidden, (hidden,)), Module("qkv_proj", hidden, (hidden, kv, kv)),
    )  # fmt: skip
    return Shape(modules, layers, kv_row, heads, hidden, vocab)


LLAMA_8B = _llama(4096, 14336, (8, 128), layers=32, heads=32, vocab=128256)
TINY = _llama(64, 128, (2, 16), layers=2, heads=4, vocab=128)


def layout(shape: Shape, lora_rank: int, layers: int, page_size: int, itemsize: int = 2) -> AdapterLayout:
    """Of an adapter with all modules, for a pool of bf16 rows."""
    modules = []
    for module in shape.modules:
        offsets = [sum(module.widths[:part]) for part in range(len(module.widths))]
        slices = tuple(SliceShape(o, w, lora_rank) for o, w in zip(offsets, module.widths, strict=True))
        modules.append(ModuleShape(module.name, module.in_features, slices))
    row = shape.kv_row[0] * shape.kv_row[1] * 2
    return plan_adapter([modules] * layers, itemsize=itemsize, row_bytes=(row, row), page_size=page_size)


class Adapters:
    """Adapters of given LoRA ranks in scattered pages of a pool of random bf16 numbers.

    Args:
        layers: of the pool; enough that reading one layer after the other misses the cache.
    """

    def __init__(
        self,
        shape: Shape,
        lora_ranks: list[int],
        layers: int,
        device: torch.device,
        page_size: int = 16,
        seed: int = 0,
    ) -> None:
        self.shape, self.layers = shape, layers
        generator = torch.Generator().manual_seed(seed)
        layouts = [layout(shape, rank, layers, page_size) for rank in lora_ranks]
        total = sum(one.slots // page_size for one in layouts) + 1
        size = (total * page_size, *shape.kv_row)
        rows = [
            torch.randn(size, device=device, dtype=torch.float32).div_(64).to(torch.bfloat16)
            for _ in range(2 * layers)
        ]
        self.pool = UnifiedPool(rows[:layers], rows[layers:], page_size=page_size)
        order = 1 + torch.randperm(total - 1, generator=generator)
        self.packed = packed(self.pool, layouts, order, torch.bfloat16)
        self.tables = TableSet([module.name for module in shape.modules], device)

    def place(self, layer: int, module: Module) -> Place:
        """For the Triton kernels."""
        return place(self.pool, torch.bfloat16, layer, self.tables, module.name, module.widths)

    def module_bytes(self, number: int, module: Module) -> int:
        """Of one adapter's matrices of a module."""
        one = self.packed[number].layout
        return one.itemsize * sum(p.rows * p.cols for p in one.layers[0].pieces_of(module.name))
