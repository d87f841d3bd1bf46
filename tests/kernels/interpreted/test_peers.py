"""What the GPU scripts compare with, on stand-ins that compute what FlashInfer's documentation says."""

from __future__ import annotations

import pytest
import torch
from support import seeds
from support.seeds import SEED

from elora_sglang.eval.gpu import attention, peers
from elora_sglang.eval.gpu.llama import Module

CPU = torch.device("cpu")


class Gemm:
    """``y[i] = x[i] W[weight_indices[i]]^T`` over segments of rows."""

    def run(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        batch_size: int,
        weight_column_major: bool,
        seg_lens: torch.Tensor,
        weight_indices: torch.Tensor,
    ) -> torch.Tensor:
        assert weight_column_major and batch_size == len(seg_lens) == len(weight_indices)
        parts = x.split(seg_lens.tolist())
        return torch.cat([part @ weights[i].t() for part, i in zip(parts, weight_indices, strict=True)])


class Decode:
    """Attention of one row a request over its pages; ``careless``: it reads the whole last page."""

    def __init__(self, careless: bool = False) -> None:
        self.careless = careless

    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last: torch.Tensor,
        heads: int,
        kv_heads: int,
        size: int,
        page: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
    ) -> None:
        assert q_data_type == kv_data_type == torch.bfloat16
        self.indptr, self.indices, self.last, self.page = indptr.tolist(), indices, last.tolist(), page
        self.group, self.size = heads // kv_heads, size

    def run(self, q: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        found = []
        for row in range(len(q)):
            pages = self.indices[self.indptr[row] : self.indptr[row + 1]].long()
            length = (len(pages) - 1) * self.page + (self.page if self.careless else self.last[row])
            k, v = (
                one[pages].flatten(0, 1)[:length].repeat_interleave(self.group, 1).float() for one in cache
            )
            weights = (torch.einsum("hd,thd->ht", q[row].float(), k) / self.size**0.5).softmax(-1)
            found.append(torch.einsum("ht,thd->hd", weights, v))
        return torch.stack(found).to(q.dtype)


def test_attention_over_the_pool_is_checked_and_adapters_stay_what_they_are() -> None:
    seeds.draw()
    found = attention.check(Decode(), SEED, CPU)
    assert found["attention"] < 0.01 and found["lora"] < 0.02


def test_an_attention_that_reads_past_the_last_token_is_noticed() -> None:
    seeds.draw()
    with pytest.raises(AssertionError, match="off by nan"):
        attention.check(Decode(careless=True), SEED, CPU)


def test_grouped_products_are_lora() -> None:
    seeds.draw()
    torch.manual_seed(SEED)
    module, picks = Module("qkv_proj", 24, (16, 8, 8)), [2, 0, 2, 1, 0, 2]
    a, bs = peers.weights(module, [4, 8, 8], CPU)
    x, out = (torch.randn(len(picks), width, dtype=torch.bfloat16) for width in (24, 32))
    right = out.double()
    for row, adapter in enumerate(picks):
        h = 0.5 * a[adapter].double() @ x[row].double()
        right[row] += torch.cat(
            [b[adapter].double() @ h[8 * part : 8 * part + 8] for part, b in enumerate(bs)]
        )
    peers.Product(Gemm(), picks, CPU).add(x, out, a, bs, 0.5)
    assert float((out.double() - right).norm() / right.norm()) < 0.02


def test_without_a_gpu_nothing_is_compared() -> None:
    assert peers.SEGMENT_GEMM.available().startswith("not compared")
    assert attention.flashinfer(SEED, CPU)["skipped"].startswith("not compared")
