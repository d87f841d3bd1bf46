"""Random inputs for tests and benchmarks of the paged LoRA kernels: adapters that really lie in a pool."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from elora_sglang.eval.gpu.cases.case import Case
from elora_sglang.kernels.paged_lora import reference
from elora_sglang.kernels.paged_lora.segments import SegmentBatch, plan_segments
from elora_sglang.kernels.paged_lora.tables import DeviceBatch, TableSet
from elora_sglang.runtime.pool.layout import AdapterLayout, ModuleShape, SliceShape, plan_adapter
from elora_sglang.runtime.pool.packing import PackedAdapter
from elora_sglang.runtime.pool.views import UnifiedPool

if TYPE_CHECKING:
    from elora_sglang.kernels.paged_lora.triton_kernel import Place

#: Imported where it runs: Triton is not on every machine.
KERNEL = "elora_sglang.kernels.paged_lora.triton_kernel"

MODULE = "module"


def packed(
    pool: UnifiedPool, layouts: Sequence[AdapterLayout], pages: torch.Tensor, dtype: torch.dtype
) -> list[PackedAdapter]:
    """Adapters of these layouts in ``pages``, taken in their order; nothing is written."""
    found = []
    for layout in layouts:
        count = layout.slots // pool.page_size
        taken, pages = pages[:count], pages[count:]
        slots = (taken[:, None] * pool.page_size + torch.arange(pool.page_size)).flatten()
        found.append(PackedAdapter(pool, layout, slots, dtype))
    return found


def place(
    pool: UnifiedPool, dtype: torch.dtype, layer: int, tables: TableSet, module: str, widths: tuple[int, ...]
) -> Place:
    """Where a module of a layer lies, for the Triton kernels."""
    k, v = (pool.byte_rows(layer, stream).view(dtype) for stream in (0, 1))
    numbers = tables.modules
    found: Place = importlib.import_module(KERNEL).Place(k, v, layer, numbers[module], len(numbers), widths)
    return found


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
    widths: tuple[int, ...]
    layer: int = 0
    module: str = MODULE
    tables: TableSet = field(init=False)

    def __post_init__(self) -> None:
        self.tables = TableSet([self.module], self.x.device)

    def batch(self) -> SegmentBatch:
        """Segments as the LoRA backend would plan them; index 0 is the base model."""
        return plan_segments(
            [count for _, count in self.rows],
            [0 if index is None else index + 1 for index, _ in self.rows],
            [None, *self.adapters],
            [0.0, *self.scalings],
            self.x.device,
        )

    def device_batch(self, tile_rows: int = 16) -> DeviceBatch:
        """The same for the Triton kernels."""
        return DeviceBatch.of(self.tables, self.batch(), tile_rows=tile_rows)

    def place(self) -> Place:
        """Where the module lies, for the Triton kernels."""
        adapter = self.adapters[0]
        return place(adapter.pool, adapter.dtype, self.layer, self.tables, self.module, self.widths)

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
    spare_pages: int = 4,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Build a pool, put one adapter per entry of ``ranks`` in it, and make a batch.

    Args:
        ranks: LoRA rank of each adapter, or one per slice (0: the adapter lacks it).
        rows: (adapter index or None, rows) per request.
        widths: output features of each slice of the module.
        kv_row: (heads, head_dim) of a KV row.
        scattered: put adapters into random pages instead of consecutive ones.
        spare_pages: pages of the pool that no adapter has, besides the first.
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
    total = sum(layout.slots // page_size for layout in layouts) + spare_pages
    buffer = torch.zeros((2, (total + 1) * page_size, *kv_row), dtype=store)
    buffer.view(torch.uint8).random_(generator=generator)
    buffer = buffer.to(device)
    pool = UnifiedPool([buffer[0]], [buffer[1]], page_size=page_size)
    order = 1 + (torch.randperm(total, generator=generator) if scattered else torch.arange(total))
    adapters, matrices = packed(pool, layouts, order, dtype), []
    for shape, adapter in zip(shapes, adapters, strict=True):
        own = [
            (torch.randn(r, c, generator=generator) / max(r, c) ** 0.5).to(dtype) for r, c in shape.matrices()
        ]
        adapter.write(lambda _, own=own: {(MODULE, i): m for i, m in enumerate(own)})  # type: ignore[misc]
        matrices.append([m.to(device) for m in own])
    count = sum(n for _, n in rows)
    x = torch.randn(count, in_features, generator=generator).to(dtype).to(device)
    out = torch.randn(count, sum(widths), generator=generator).to(dtype).to(device)
    scalings = [0.5 + 0.25 * i for i in range(len(ranks))]
    return Inputs(x, out, adapters, matrices, shapes, scalings, list(rows), tuple(widths))


def case(name: str, inputs: Inputs, tile_rows: int = 16, **sizes: int) -> Case:
    """LoRA on top of a base output; scratch memory is poisoned before each run. ``sizes``: of the kernels' config."""

    def run_reference() -> torch.Tensor:
        return reference.add_lora(inputs.x, inputs.out.clone(), inputs.batch(), inputs.layer, inputs.module)

    def run_triton() -> torch.Tensor:
        kernel = importlib.import_module(KERNEL)
        config, batch = kernel.Config(**sizes), inputs.device_batch(tile_rows)
        size = (config.splits, len(batch.order), batch.rank_rows)
        h = torch.full(size, float("nan"), device=inputs.x.device)
        found: torch.Tensor = kernel.add_lora(inputs.x, inputs.out.clone(), batch, inputs.place(), config, h)
        return found

    tolerance = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[inputs.x.dtype]
    return Case(
        "paged_lora", name, {"reference": run_reference, "triton": run_triton}, inputs.expected, tolerance
    )


#: (adapter or None, rows) per request: prefill, decode and mixtures, base rows and empty segments included.
BATCHES: dict[str, list[tuple[int | None, int]]] = {
    "prefill": [(0, 7), (None, 5), (1, 40), (2, 3), (3, 9), (4, 17)],
    "decode, interleaved": [(i % 5 if i % 6 else None, 1) for i in range(30)],
    "one token": [(3, 1)],
    "empty segments": [(0, 0), (1, 3), (None, 0), (2, 0), (1, 2), (4, 0)],
    "base only": [(None, 4), (None, 1)],
    "nothing": [],
    "long runs": [(0, 60), (1, 60), (0, 60), (1, 60)],
}


def awkward(seed: int, device: torch.device | str) -> Iterator[Case]:
    """Mixed LoRA ranks, every batch, pages of 1 and 16 in any order, parts that are missing, all types of pool."""
    ranks = [1, 8, 12, 64, 4]
    for number, (name, rows) in enumerate(BATCHES.items()):
        for page_size, scattered in ((1, True), (16, True), (1, False)):
            inputs = make_inputs(
                seed=seed + number, ranks=ranks, rows=rows, page_size=page_size, scattered=scattered,
                device=device,
            )  # fmt: skip
            yield case(f"{name}, page {page_size}, {'any' if scattered else 'one run'}", inputs)
    fused: list[int | Sequence[int]] = [(8, 0, 8), (16, 2, 4), (0, 3, 0), 5]
    rows = [(0, 3), (1, 4), (None, 2), (2, 5), (3, 1), (0, 1)]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for kv_dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
            inputs = make_inputs(
                seed=seed, ranks=fused, rows=rows, widths=(64, 16, 16), dtype=dtype, kv_dtype=kv_dtype,
                scattered=True, device=device,
            )  # fmt: skip
            yield case(f"fused with missing parts, {dtype} in {kv_dtype}", inputs)
    wide = make_inputs(
        seed=seed, ranks=[64, 3], rows=[(0, 33), (1, 2)], in_features=416, widths=(208, 48), device=device
    )
    yield case("splits, wide tiles, odd blocks", wide, 64, splits=3, in_block=64, out_block=32, rank_block=32)
    cut = make_inputs(
        seed=seed, ranks=[48], rows=[(0, 5)], in_features=96, widths=(16, 16), scattered=True, device=device
    )
    pieces = cut.adapters[0].layout.layers[0].pieces
    if len({piece.matrix for piece in pieces}) == len(pieces):
        raise AssertionError("no matrix is cut in two: choose other sizes")
    yield case("a matrix cut in two", cut)
