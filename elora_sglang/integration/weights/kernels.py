"""The LoRA backend's Triton path: tables of a batch on the device, and where each module lies.

Decode batches that replay a CUDA graph use one set of tables at fixed addresses, refilled before each replay; all
others get tables of their own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from elora_sglang.kernels.paged_lora import triton_kernel as kernel
from elora_sglang.kernels.paged_lora.segments import SegmentBatch
from elora_sglang.kernels.paged_lora.tables import DeviceBatch, TableSet

if TYPE_CHECKING:
    from elora_sglang.runtime.lora_pool import BatchAdapters
    from elora_sglang.runtime.pool.views import UnifiedPool

#: Parts of a fused module (q, k, v), each with LoRA-rank rows of its own.
MOST_PARTS = 3
#: Rows of a tile: of decode batches, whose adapters have a row or a few each, and of others.
DECODE_TILE, PREFILL_TILE = 16, 64
#: Programs that keep a GPU busy; fewer tiles than that share out the input features.
BUSY_PROGRAMS, MOST_SPLITS = 256, 8


class TritonLoRA:
    """LoRA of one server process through the Triton kernels.

    Args:
        memory_pool: bound to the KV pool; its adapters and its pool's rows are what the kernels read.
    """

    def __init__(self, memory_pool: BatchAdapters) -> None:
        self._memory, self._pool = memory_pool, memory_pool.pool
        self._modules = sorted(memory_pool.target_modules)
        self._tables = TableSet(self._modules, memory_pool.pool.device)
        self._places: dict[tuple[int, str], kernel.Place] = {}
        self._static: DeviceBatch | None = None

    def reads(self, pool: UnifiedPool) -> bool:
        """Whether this is the pool whose rows the kernels read; SGLang may bind another one."""
        return pool is self._pool

    @property
    def graph_rank(self) -> int:
        """The largest LoRA rank of an adapter that CUDA graphs have room for."""
        return max(self._memory.graph_rank, self._memory.largest_rank)

    def reserve(self, rows: int) -> None:
        """Make the tables that CUDA graphs of up to ``rows`` rows are captured with; larger ranks are refused then."""
        rank = self._memory.most_rank = self.graph_rank
        self._static = DeviceBatch.empty(
            self._tables, rows, min(rows, self._memory.max_loras_per_batch),
            rank_rows=MOST_PARTS * rank, rank=rank, tile_rows=DECODE_TILE,
        )  # fmt: skip

    def plan(self, batch: SegmentBatch, rows: int, *, graph: bool) -> DeviceBatch:
        """Tables for a forward of ``rows`` rows.

        ``graph``: in the memory that CUDA graphs read, after all transfers of the batch's adapters; no Python runs
        between the layers of a replay, so it cannot wait for them there. Raises RuntimeError before :meth:`reserve`.
        """
        if not graph:
            longest = max((segment.stop - segment.start for segment in batch.segments), default=0)
            tile = DECODE_TILE if longest <= DECODE_TILE else PREFILL_TILE
            return DeviceBatch.of(self._tables, batch, tile_rows=tile)
        if self._static is None:
            raise RuntimeError("elora: a CUDA graph is replayed for which no tables were reserved")
        for layer in range(self._memory.num_layer):
            self._memory.wait_layer(layer)
        self._static.fill(batch)
        return self._static.first(rows)

    def add_lora(
        self, x: torch.Tensor, out: torch.Tensor, batch: DeviceBatch, layer: int, module: str
    ) -> torch.Tensor:
        """``out += LoRA(x)``; changes and returns ``out``."""
        return kernel.add_lora(x, out, batch, self._place(layer, module), _config(batch, x.shape[1]))

    def shrink(self, x: torch.Tensor, batch: DeviceBatch, layer: int, module: str) -> torch.Tensor:
        """``A @ x``: ``[grouped rows, LoRA-rank rows]`` in x's dtype, zero where an adapter has fewer."""
        config = _config(batch, x.shape[1])
        h = torch.zeros(
            (config.splits, len(batch.order), batch.rank_rows), dtype=torch.float32, device=x.device
        )
        kernel.shrink_into(x, h, batch, self._place(layer, module), config)
        return (h[0] if config.splits == 1 else h.sum(0)).to(x.dtype)

    def expand(
        self, h: torch.Tensor, out: torch.Tensor, batch: DeviceBatch, layer: int, module: str
    ) -> torch.Tensor:
        """``out += scaling * B @ h`` with ``h`` from :meth:`shrink`; changes and returns ``out``."""
        kernel.expand_from(h.unsqueeze(0), out, batch, self._place(layer, module), kernel.Config())
        return out

    def _place(self, layer: int, module: str) -> kernel.Place:
        found = self._places.get((layer, module))
        if found is None:
            pool, dtype = self._memory.pool, self._memory.dtype
            rows = [pool.byte_rows(layer, stream).view(dtype) for stream in (0, 1)]
            number = self._modules.index(module)
            widths = self._memory.part_widths(layer, module)
            found = kernel.Place(rows[0], rows[1], layer, number, len(self._modules), widths)
            self._places[layer, module] = found
        return found


def _config(batch: DeviceBatch, in_features: int) -> kernel.Config:
    """Few programs share out the input features. A batch always gets the same choice, so its results are the same.

    Where a CUDA graph is captured the LoRA ranks are not known: programs for rows that an adapter lacks end at once,
    and do not count.
    """
    blocks_of_ranks = 1 if batch.fixed else math.ceil(batch.rank_rows / kernel.Config.rank_block)
    free = BUSY_PROGRAMS // max(len(batch.tiles) * blocks_of_ranks, 1)
    blocks = math.ceil(in_features / kernel.Config.in_block)
    splits = 1
    while splits * 2 <= min(free, blocks, MOST_SPLITS):
        splits *= 2
    return kernel.Config(splits=splits)
