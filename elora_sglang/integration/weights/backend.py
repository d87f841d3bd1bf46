"""LoRA backend ``elora``: base layer plus LoRA, with adapter weights read from pages of the KV pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.utils import get_batch_token_counts

from elora_sglang.integration.weights.pool import PLACE, refuse_embeddings
from elora_sglang.kernels.paged_lora import SegmentBatch, add_lora, expand, plan_segments, shrink

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from elora_sglang.integration.weights.kernels import TritonLoRA
    from elora_sglang.kernels.paged_lora.tables import DeviceBatch
    from elora_sglang.runtime.lora_pool import BatchAdapters

NAME = "elora"
_NO_POOL = "elora: no memory pool attached; the hook that binds the pool did not run"


@dataclass
class EloraBatchInfo:
    """Routing of one forward. SGLang sets and reads ``has_active_lora`` and ``is_prefill``.

    ``tables``: the rows for the Triton kernels; None: plain PyTorch.
    """

    rows: SegmentBatch
    tables: DeviceBatch | None = None
    has_active_lora: bool = False
    is_prefill: bool = False
    use_cuda_graph: bool = False


class EloraLoRABackend(BaseLoRABackend):
    """Any number of adapters and any mix of LoRA ranks per batch; nothing is padded or copied.

    On a GPU through the Triton kernels, with decode CUDA graphs; elsewhere in plain PyTorch.
    """

    name = NAME
    supports_prefill_cuda_graph = False

    def __init__(self, max_loras_per_batch: int, device: torch.device, **_: Any) -> None:
        super().__init__(max_loras_per_batch, device)
        #: Set by ``EloraLoRAMemoryPool.attach``.
        self.memory_pool: BatchAdapters | None = None
        self.uses_triton = torch.device(device).type == "cuda"
        # A batch of base-model requests only runs SGLang's plain layers, without any LoRA call. With CUDA graphs that
        # takes a second graph of each batch size, which SGLang captures for this kind of skipping.
        self.skip_inactive_lora_batches = not self.uses_triton
        self.skip_inactive_dense_lora = self.uses_triton
        self._triton: TritonLoRA | None = None
        self._graph_rows = 0

    def validate_lora_targets(self, base_model: torch.nn.Module, target_modules: set[str]) -> None:
        """Refuse, before layers are wrapped, what this backend cannot run."""
        refuse_embeddings(set(target_modules))

    def init_decode_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_req: int) -> None:
        """Make the tables that decode graphs are captured with."""
        self._graph_rows = max_bs_in_cuda_graph * num_tokens_per_req
        self.triton.reserve(self._graph_rows)

    @property
    def triton(self) -> TritonLoRA:
        """The Triton path. Raises RuntimeError before the memory pool is attached."""
        if self.memory_pool is None:
            raise RuntimeError(_NO_POOL)
        if self._triton is None or not self._triton.reads(self.memory_pool.pool):
            from elora_sglang.integration.weights.kernels import TritonLoRA  # not on a machine without Triton

            self._triton = TritonLoRA(self.memory_pool)
            if self._graph_rows:
                self._triton.reserve(self._graph_rows)
        return self._triton

    def prepare_lora_batch(
        self,
        forward_batch: ForwardBatch,
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
        use_cuda_graph: bool,
        use_prefill_cuda_graph: bool = False,
    ) -> None:
        """Group the rows of the coming forward by adapter; see the base class for the arguments."""
        if use_prefill_cuda_graph or (use_cuda_graph and not self.uses_triton):
            raise RuntimeError("elora: this CUDA graph cannot run LoRA; use --disable-cuda-graph")
        if self.memory_pool is None:
            raise RuntimeError(_NO_POOL)
        mode = forward_batch.forward_mode
        if mode.is_extend_without_speculative():
            lengths = list(forward_batch.extend_seq_lens_cpu)
        else:
            rows, per_request = get_batch_token_counts(forward_batch)
            lengths = [per_request] * (rows // per_request if per_request else 0)
        batch = plan_segments(
            lengths,
            weight_indices[: len(lengths)],
            self.memory_pool.batch_adapters,
            scalings,
            "cpu" if self.uses_triton else self.device,
        )
        tables = self.triton.plan(batch, sum(lengths), graph=use_cuda_graph) if self.uses_triton else None
        self.batch_info = EloraBatchInfo(batch, tables, use_cuda_graph=use_cuda_graph)

    def forward_with_base(
        self,
        layer: Any,
        x: torch.Tensor,
        base_fn: Callable[[], torch.Tensor],
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        output_offset: Any,
        offsets: Any,
        *,
        all_reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
        kind: Any = "linear",
        pruned_batch_info: Any = None,
    ) -> torch.Tensor:
        """Base layer plus LoRA for every kind of linear layer; changes the base output in place.

        ``lora_a`` is a placeholder that says which module this is. With ``all_reduce`` (row-parallel
        layer, A sharded along the input) the base output and A's output are reduced separately.
        """
        place: tuple[int, str] = getattr(lora_a, PLACE)
        rows = self.batch_info.rows
        assert self.memory_pool is not None  # prepare_lora_batch has seen it
        if not self.batch_info.use_cuda_graph:  # there, all layers were waited for before the graph
            self.memory_pool.wait_layer(place[0])
        tables = self.batch_info.tables
        if all_reduce is None:
            if tables is not None:
                return self.triton.add_lora(x, base_fn(), tables, *place)
            return add_lora(x, base_fn(), rows, *place)
        h = shrink(x, rows, *place) if tables is None else self.triton.shrink(x, tables, *place)
        out = all_reduce(base_fn())
        h = all_reduce(h) if h.numel() else h
        return expand(h, out, rows, *place) if tables is None else self.triton.expand(h, out, tables, *place)


def create() -> type[EloraLoRABackend]:
    """Factory to register as LoRA backend ``elora`` (SGLang: ``lora/backend/lora_registry.py``)."""
    return EloraLoRABackend
