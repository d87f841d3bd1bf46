"""SGLang's LoRA memory pool without memory of its own: adapters live in KV token slots.

Replaces ``sglang.srt.lora.mem_pool.LoRAMemoryPool``: here are the methods that SGLang calls. What ELORA asks of it,
how adapters are laid out and which are resident, is in ``pooled.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.mem_pool import LoRAMemoryPool
from sglang.srt.lora.utils import EMBEDDING_NAMES, get_normalized_target_modules

from elora_sglang.integration.weights.pooled import PooledAdapters
from elora_sglang.runtime.adapters.files import AdapterError

#: Attribute of the placeholder tensors that LoRA layers hold: (layer, module name).
PLACE = "_elora_place"


class EloraLoRAMemoryPool(PooledAdapters, LoRAMemoryPool):
    """Adapters in slots of the KV pool. Same constructor as the class of SGLang's that it replaces."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        PooledAdapters.__init__(self)
        # Not by its name: SGLang's plugin registry makes that name mean this class, in this module as in all others.
        super(PooledAdapters, self).__init__(*args, **kwargs)

    def drop_all(self) -> None:
        """Forget all residency, as after a flush."""
        super().drop_all()
        # SGLang captures graphs and warms up with batches of the base model that no `prepare_lora_batch` here saw.
        self.uid_to_buffer_id: dict[str | None, int] = {None: 0}

    def init_buffers(self, base_model: torch.nn.Module) -> None:
        """Allocate nothing: the buffers are shapes without memory, which LoRA layers read and pass on."""
        if self._has_moe_module(base_model):
            raise ValueError(
                "elora: LoRA on mixture-of-experts models is not supported; serve without --elora"
            )
        refuse_embeddings(self.target_modules)
        self.base_model = base_model
        for buffers, shape_of in (
            (self.A_buffer, self.get_lora_A_shape),
            (self.B_buffer, self.get_lora_B_shape),
        ):
            for module in sorted(self.target_modules):
                buffers[module] = [
                    _placeholder(shape_of(module, base_model, self.max_lora_rank, layer), layer, module)
                    for layer in range(self.num_layer)
                ]

    def can_support(self, config: LoRAConfig | Iterable[LoRAConfig]) -> bool:
        """Any LoRA rank, up to what CUDA graphs have room for; target modules must be among those that are wrapped."""
        if not isinstance(config, LoRAConfig):
            return all(self.can_support(one) for one in config)
        rank = max(config.r, *((config.hf_config or {}).get("rank_pattern") or {"": 0}).values())
        if self.most_rank is not None and rank > self.most_rank:
            raise AdapterError(
                config.path or "adapter",
                f"its LoRA rank {rank} is above {self.most_rank}, for which CUDA graphs were captured",
                f"Start the server with --elora-graph-rank {rank}, or with --disable-cuda-graph.",
            )
        targets = get_normalized_target_modules(config.target_modules)
        missing = sorted(targets - self.target_modules - {"all"})
        if missing:
            raise AdapterError(
                config.path or "adapter",
                f"target modules {', '.join(missing)} are not served",
                f"--lora-target-modules has {', '.join(sorted(self.target_modules))}.",
            )
        return True

    def prepare_lora_batch(
        self,
        cur_uids: set[str | None],
        lora_adapters: Any,
        lora_modules: Any,
        lora_refs: Any,
        lora_embed_tokens_module: Any = None,
        lora_lm_head_module: Any = None,
    ) -> None:
        """Number this batch's adapters; copies nothing. Arguments as in the class it replaces.

        Raises:
            RuntimeError: an adapter of the batch is not resident. Admission makes it so; serving the
                batch with other bytes would be wrong silently, so this is the last line of defence.
        """
        missing = sorted(uid for uid in cur_uids if uid is not None and uid not in self._packed)
        if missing:
            raise RuntimeError(f"elora: batch with adapters that are not resident: {', '.join(missing)}")
        numbered: list[str | None] = [*sorted(uid for uid in cur_uids if uid is not None)]
        if None in cur_uids or len(numbered) < self.max_loras_per_batch:
            numbered.insert(0, None)
        if len(numbered) > self.max_loras_per_batch:
            raise RuntimeError(
                f"elora: {len(numbered)} adapters in one batch, "
                f"--max-loras-per-batch is {self.max_loras_per_batch}"
            )
        self.uid_to_buffer_id = {uid: index for index, uid in enumerate(numbered)}
        self.batch_adapters = [None if uid is None else self._packed[uid] for uid in numbered]

    def remove_lora(self, uid: str) -> None:
        """SGLang unloads the adapter. Slots belong to the cache, which drops them with the branch."""
        if uid not in self._packed:
            self._layouts.pop(uid, None)
            self.store.forget(uid)


def refuse_embeddings(target_modules: set[str]) -> None:
    """Raise ValueError when LoRA on the vocabulary is asked for: it needs buffers of its own."""
    unsupported = sorted(target_modules & set(EMBEDDING_NAMES))
    if unsupported:
        raise ValueError(
            f"elora: LoRA on {', '.join(unsupported)} is not supported; remove it from --lora-target-modules"
        )


def _placeholder(shape: tuple[int, ...], layer: int, module: str) -> torch.Tensor:
    tensor = torch.empty(shape, device="meta")
    setattr(tensor, PLACE, (layer, module))
    return tensor
