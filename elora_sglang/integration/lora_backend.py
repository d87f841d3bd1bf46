"""LoRA backend ``elora``: base layer plus LoRA, with adapter weights read from pages of the KV pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.utils import get_batch_token_counts

from elora_sglang.integration.lora_pool import PLACE, refuse_embeddings
from elora_sglang.kernels.paged_lora import SegmentBatch, add_lora, expand, plan_segments, shrink

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from elora_sglang.integration.lora_pool import EloraLoRAMemoryPool

NAME = "elora"


@dataclass
class EloraBatchInfo:
    """Routing of one forward. SGLang sets and reads ``has_active_lora`` and ``is_prefill``."""

    rows: SegmentBatch
    has_active_lora: bool = False
    is_prefill: bool = False
    use_cuda_graph: bool = False


class EloraLoRABackend(BaseLoRABackend):
    """Any number of adapters and any mix of LoRA ranks per batch; nothing is padded or copied."""

    name = NAME
    # A batch of base-model requests only runs SGLang's plain layers, without any LoRA call.
    skip_inactive_lora_batches = True
    supports_prefill_cuda_graph = False

    def __init__(self, max_loras_per_batch: int, device: torch.device, **_: Any) -> None:
        super().__init__(max_loras_per_batch, device)
        #: Set by ``EloraLoRAMemoryPool.attach``.
        self.memory_pool: EloraLoRAMemoryPool | None = None

    def validate_lora_targets(self, base_model: torch.nn.Module, target_modules: set[str]) -> None:
        """Refuse, before layers are wrapped, what this backend cannot run."""
        refuse_embeddings(set(target_modules))

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
        if use_cuda_graph or use_prefill_cuda_graph:
            raise RuntimeError("elora: CUDA graphs are not supported with LoRA yet; use --disable-cuda-graph")
        if self.memory_pool is None:
            raise RuntimeError("elora: no memory pool attached; the hook that binds the pool did not run")
        mode = forward_batch.forward_mode
        if mode.is_extend_without_speculative():
            lengths = list(forward_batch.extend_seq_lens_cpu)
        else:
            rows, per_request = get_batch_token_counts(forward_batch)
            lengths = [per_request] * (rows // per_request if per_request else 0)
        self.batch_info = EloraBatchInfo(
            plan_segments(
                lengths,
                weight_indices[: len(lengths)],
                self.memory_pool.batch_adapters,
                scalings,
                self.device,
            )
        )

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
        self.memory_pool.wait_layer(place[0])
        if all_reduce is None:
            return add_lora(x, base_fn(), rows, *place)
        h = shrink(x, rows, *place)
        out = all_reduce(base_fn())
        return expand(all_reduce(h) if h.numel() else h, out, rows, *place)


def create() -> type[EloraLoRABackend]:
    """Factory to register as LoRA backend ``elora`` (SGLang: ``lora/backend/lora_registry.py``)."""
    return EloraLoRABackend
