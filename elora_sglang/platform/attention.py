"""SGLang attention backend ``elora_cpu``: stock's contract, with :mod:`elora_sglang.platform.attend` inside.

Stock's ``torch_native`` pads the query of a prefill to the full length, so that a cache hit of 2,000 tokens pays for
2,000 rows, and loops over the requests of a decode batch. What it alone can do (cross attention, encoders, sliding
window pools) is left to it.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from elora_sglang.platform.attend import Group, attend, plan


def create(runner: Any) -> EloraCpuAttention:
    """Factory for SGLang's attention registry. Raises ValueError for a model with latent (MLA) attention."""
    if runner.use_mla_backend:
        raise ValueError(
            "attention backend elora_cpu serves no MLA model: give --attention-backend torch_native"
        )
    return EloraCpuAttention(runner)


class EloraCpuAttention(TorchNativeAttnBackend):
    """Prefill, decode and mixed batches through one plan per forward pass."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._groups: list[Group] = []

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Group the batch's requests by shape; used by all layers of this pass."""
        super().init_forward_metadata(forward_batch)
        total = forward_batch.seq_lens.tolist()
        extending = forward_batch.forward_mode.is_extend()
        new = forward_batch.extend_seq_lens.tolist() if extending else [1] * len(total)
        table = self.req_to_token_pool.req_to_token
        self._groups = plan(table, forward_batch.req_pool_indices.tolist(), new, total)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """New tokens of every request, after or without a cached prefix; returns ``[tokens, heads * Dv]``."""
        if self._is_stock_only(layer):
            stock: torch.Tensor = super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
            return stock
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        """One new token of every request; returns ``[requests, heads * Dv]``."""
        if self._is_stock_only(layer):
            stock: torch.Tensor = super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
            return stock
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def _is_stock_only(self, layer: Any) -> bool:
        return bool(
            layer.is_cross_attention
            or layer.attn_type != AttentionType.DECODER
            or self.use_sliding_window_kv_pool
        )

    def _forward(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        if save_kv_cache and k is not None and v is not None:
            location = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, location, k, v)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output = query.new_zeros(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        for group in self._groups:
            attend(
                group,
                query,
                output,
                keys,
                values,
                scaling=layer.scaling,
                logit_cap=layer.logit_cap or 0.0,
                window=-1 if layer.sliding_window_size is None else layer.sliding_window_size,
            )
        return output.view(query.shape[0], -1)
