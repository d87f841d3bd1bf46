"""A few LoRA-wrapped SGLang layers without an engine: enough to load adapters and run batches.

Tensor-parallel shards are built one after the other in this process: SGLang's layers take rank and
size from its parallel context, which is overridden while they are made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    _LogicalGroup,
)
from sglang.srt.lora import layers as lora_layers
from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.mem_pool import LoRAMemoryPool
from sglang.srt.lora.utils import LoRAType, get_target_module_name
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel

from elora_sglang.integration.weights.backend import EloraLoRABackend
from elora_sglang.integration.weights.peft import normalize_weights
from elora_sglang.integration.weights.pool import EloraLoRAMemoryPool
from elora_sglang.runtime.pool.views import UnifiedPool

MODULES = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}


@dataclass(frozen=True)
class Shape:
    """Sizes of the toy model."""

    hidden: int = 64
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 16
    inner: int = 96
    layers: int = 2

    def features(self, module: str) -> tuple[int, int]:
        """(input, output) features of an unfused module, all tp ranks together."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, q),
            "k_proj": (self.hidden, kv),
            "v_proj": (self.hidden, kv),
            "o_proj": (q, self.hidden),
            "gate_proj": (self.hidden, self.inner),
            "up_proj": (self.hidden, self.inner),
            "down_proj": (self.inner, self.hidden),
            "qkv_proj": (self.hidden, q + 2 * kv),
            "gate_up_proj": (self.hidden, 2 * self.inner),
        }[module]

    def config(self) -> SimpleNamespace:
        return SimpleNamespace(
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            vocab_size=32,
        )


@contextmanager
def tp_shard(tp_rank: int, tp_size: int) -> Iterator[None]:
    """Layers made inside belong to this shard; nothing needs a real process group."""
    group = _LogicalGroup(tp_rank, tp_size)
    with get_parallel().override(
        tp_size=tp_size,
        tp_rank=tp_rank,
        tp_group=group,
        attn_tp_size=tp_size,
        attn_tp_rank=tp_rank,
        attn_tp_group=group,
    ):
        yield


@contextmanager
def no_pinning() -> Iterator[None]:
    """SGLang's LoRA layers pin small tensors unconditionally, which needs a GPU driver."""

    def unpinned(make: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            kwargs.pop("pin_memory", None)
            return make(*args, **kwargs)

        return call

    with (
        mock.patch.object(torch, "tensor", unpinned(torch.tensor)),
        mock.patch.object(torch, "zeros", unpinned(torch.zeros)),
        mock.patch.object(torch.Tensor, "pin_memory", lambda self: self),
    ):
        yield


class _Part(torch.nn.Module):
    def __init__(self, **modules: torch.nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class ToyModel(torch.nn.Module):
    """Decoder layers' linear modules under SGLang's usual names, without the decoder."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int = 0) -> None:
        super().__init__()
        self.config = shape.config()
        layers = []
        for _ in range(shape.layers):
            attention = _Part(
                qkv_proj=QKVParallelLinear(
                    shape.hidden, shape.head_dim, shape.heads, shape.kv_heads, bias=False, params_dtype=dtype
                ),
                o_proj=RowParallelLinear(
                    shape.heads * shape.head_dim, shape.hidden, bias=False, params_dtype=dtype
                ),
            )
            mlp = _Part(
                gate_up_proj=MergedColumnParallelLinear(
                    shape.hidden, [shape.inner] * 2, bias=False, params_dtype=dtype
                ),
                down_proj=RowParallelLinear(shape.inner, shape.hidden, bias=False, params_dtype=dtype),
            )
            layers.append(_Part(self_attn=attention, mlp=mlp))
        self.model = _Part(layers=torch.nn.ModuleList(layers))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)


@dataclass
class World:
    """One tp rank's view: model, wrapped layers, memory pool, backend; stock ones for comparison."""

    shape: Shape
    model: ToyModel
    pool: Any
    lora_manager: SimpleNamespace
    stock: bool = False
    kv: tuple[list[torch.Tensor], list[torch.Tensor]] = field(default=([], []))

    def add(self, lora_id: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LoRAAdapter:
        """Read an adapter the way SGLang does; with our normalisation around stock's unless all is stock."""
        adapter = LoRAAdapter(
            lora_id,
            LoRAConfig.from_dict(config),
            self.model.config,
            None,  # type: ignore[arg-type]  # only used to find files
            self.lora_manager.lora_backend,
            base_model=self.model,
        )
        original = LoRAAdapter._normalize_weights
        ours = original if self.stock else lambda adapter: normalize_weights(original, adapter)
        with mock.patch.object(LoRAAdapter, "_normalize_weights", ours):
            adapter.initialize_weights_from_tensors(dict(tensors))
        self.lora_manager.loras[lora_id] = adapter
        self.lora_manager.lora_refs[lora_id] = SimpleNamespace(pinned=False, lora_path=None)
        return adapter

    def layer(self, layer: int, module: str) -> Any:
        return next(m for name, m in self.lora_manager.lora_modules[layer].items() if name.endswith(module))

    def batch(self, requests: list[tuple[str | None, int]]) -> None:
        """Make (adapter, rows) requests the current batch, through SGLang's own sequence of calls."""
        ids = [lora_id for lora_id, _ in requests]
        with no_pinning():
            self.pool.prepare_lora_batch(
                cur_uids=set(ids),
                lora_adapters=self.lora_manager.loras,
                lora_modules=self.lora_manager.lora_modules,
                lora_refs={},
                lora_embed_tokens_module=None,
                lora_lm_head_module=None,
            )
        ranks, scalings = [0] * self.pool.max_loras_per_batch, [0.0] * self.pool.max_loras_per_batch
        for lora_id in filter(None, ids):
            index = self.pool.get_buffer_id(lora_id)
            ranks[index] = self.lora_manager.loras[lora_id].config.r
            scalings[index] = self.lora_manager.loras[lora_id].scaling
        lengths = [rows for _, rows in requests]
        forward = SimpleNamespace(
            batch_size=len(requests),
            extend_seq_lens_cpu=lengths,
            extend_seq_lens=torch.tensor(lengths, dtype=torch.int32),
            forward_mode=ForwardMode.EXTEND,
        )
        backend = self.lora_manager.lora_backend
        indices = [self.pool.uid_to_buffer_id[i] for i in ids]
        with no_pinning():
            backend.prepare_lora_batch(forward, indices, ranks, scalings, False)
        backend.batch_info.has_active_lora = any(ids)


def make_world(
    shape: Shape | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    page_size: int = 1,
    slots: int = 4096,
    tp: tuple[int, int] = (0, 1),
    max_loras: int = 32,
    stock: bool = False,
) -> World:
    """Build one tp rank (``tp`` = (tp_rank, tp_size)) with a KV pool of ``slots`` slots.

    ``kv_dtype`` is the KV pool's type as configured; fp8 is stored as uint8, like in SGLang. ``stock``:
    the same with SGLang's own slot buffers (LoRA rank up to 64) and ``torch_native`` backend.
    """
    shape = shape or Shape()
    with tp_shard(*tp), no_pinning():
        model = ToyModel(shape, dtype)
        backend_class, pool_class = (
            (TorchNativeLoRABackend, LoRAMemoryPool) if stock else (EloraLoRABackend, EloraLoRAMemoryPool)
        )
        backend = backend_class(max_loras, torch.device("cpu"))
        wrapped: list[dict[str, Any]] = [{} for _ in range(shape.layers)]
        for index, decoder in enumerate(model.model.layers):
            for parent in ("self_attn", "mlp"):
                for name, module in list(getattr(decoder, parent).named_children()):
                    layer = lora_layers.get_lora_layer(module, backend)
                    setattr(getattr(decoder, parent), name, layer)
                    wrapped[index][f"model.layers.{index}.{parent}.{name}"] = layer
        pool = pool_class(
            base_hf_config=model.config,
            max_loras_per_batch=max_loras,
            dtype=dtype,
            max_lora_rank=64 if stock else 4,
            target_modules=set(MODULES),
            base_model=model,
            eviction_policy="lru",
            lora_added_tokens_size=0,
        )
        for index, modules in enumerate(wrapped):
            for name, layer in modules.items():
                target = get_target_module_name(name, MODULES)
                layer.set_lora_info(
                    pool.get_tensor(target, index, LoRAType.LORA_A),
                    pool.get_tensor(target, index, LoRAType.LORA_B),
                )
    lora_manager = SimpleNamespace(loras={}, lora_refs={}, lora_modules=wrapped, lora_backend=backend)
    world = World(shape, model, pool, lora_manager, stock)
    if not stock:
        pool.attach(lora_manager)
        bind_kv(world, kv_dtype or dtype, page_size, slots, max(1, shape.kv_heads // tp[1]))
    return world


def bind_kv(world: World, kv_dtype: torch.dtype, page_size: int, slots: int, kv_heads: int) -> None:
    """Give the world a fresh KV pool, laid out like SGLang's MHATokenToKVPool (K and V halves fused)."""
    store = torch.uint8 if kv_dtype.itemsize == 1 else kv_dtype
    rows = slots + page_size
    fused = [
        torch.zeros((2, rows, kv_heads, world.shape.head_dim), dtype=store) for _ in range(world.shape.layers)
    ]
    for buffer in fused:
        buffer.view(torch.uint8).random_(generator=torch.Generator().manual_seed(1))
    world.kv = ([b[0] for b in fused], [b[1] for b in fused])
    world.pool.bind(UnifiedPool(*world.kv, page_size=page_size))


def random_adapter(
    shape: Shape,
    modules: list[str],
    rank: int,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    layers: list[int] | None = None,
    **config: Any,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A PEFT config and noticeable random tensors; a ``rank_pattern`` in ``config`` is honoured."""
    generator = torch.Generator().manual_seed(seed)
    options = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": modules, **config}
    tensors: dict[str, torch.Tensor] = {}
    for layer in layers if layers is not None else range(shape.layers):
        for module in modules:
            parent = "mlp" if module in ("gate_proj", "up_proj", "down_proj", "gate_up_proj") else "self_attn"
            n_in, n_out = shape.features(module)
            own = options.get("rank_pattern", {}).get(module, rank)
            stem = f"base_model.model.model.layers.{layer}.{parent}.{module}"
            a = torch.randn(own, n_in, generator=generator) / n_in**0.5
            b = torch.randn(n_out, own, generator=generator) / own**0.5
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a.to(dtype), b.to(dtype)
    return options, tensors


def scattered_slots(count: int, slots: int, page_size: int, seed: int) -> torch.Tensor:
    """``count`` slots as whole pages in random places, never page 0, in random page order."""
    generator = torch.Generator().manual_seed(seed)
    pages = torch.randperm(slots // page_size, generator=generator)[: count // page_size]
    return ((pages[:, None] + 1) * page_size + torch.arange(page_size)).flatten()


def contiguous_slots(count: int, page_size: int, first_page: int = 1) -> torch.Tensor:
    """``count`` consecutive slots from the start of ``first_page``."""
    return torch.arange(first_page * page_size, first_page * page_size + count)
