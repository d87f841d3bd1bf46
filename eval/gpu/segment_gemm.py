"""The same batches by FlashInfer's SegmentGEMM on slot buffers of the largest rank, where it can be imported.

As Punica's LoRA would run on it: rows grouped by adapter, one grouped product for A, one for each part of B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from elora_sglang.eval.gpu.llama import Module
from elora_sglang.eval.gpu.slot_buffers import Decode

#: Scratch memory of FlashInfer in bytes, as its documentation advises.
WORKSPACE = 128 * 2**20
NAME = "FlashInfer SegmentGEMM"


def _import() -> Any:
    from flashinfer import SegmentGEMMWrapper

    return SegmentGEMMWrapper


def available() -> str:
    """:data:`NAME`, or why it is not compared."""
    if not torch.cuda.is_available():
        return "not compared: no CUDA device"
    try:
        _import()
    except ImportError as error:
        return f"not compared: {error}"
    return NAME


class Product:
    """LoRA of one batch by grouped products.

    Args:
        gemm: ``flashinfer.SegmentGEMMWrapper``, or what computes the same.
        picks: the adapter of each row.
    """

    def __init__(self, gemm: Any, picks: Sequence[int], device: torch.device) -> None:
        order = sorted(range(len(picks)), key=lambda row: (picks[row], row))
        used = sorted(set(picks))
        counts = [list(picks).count(adapter) for adapter in used]
        self._gemm = gemm
        self._order = torch.tensor(order, dtype=torch.int64, device=device)
        self._lengths = torch.tensor(counts, dtype=torch.int64, device=device)
        self._adapters = torch.tensor(used, dtype=torch.int64, device=device)

    def _run(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._gemm.run(
            x, weights, len(self._lengths), True, seg_lens=self._lengths, weight_indices=self._adapters
        )
        return found

    def add(
        self, x: torch.Tensor, out: torch.Tensor, a: torch.Tensor, bs: Sequence[torch.Tensor], scaling: float
    ) -> None:
        """``out += scaling * B A x``. Mutates ``out``.

        Args:
            x, out: ``[rows, in]``, ``[rows, sum of widths]``.
            a: ``[adapters, parts * rank, in]``.
            bs: ``[adapters, width, rank]`` of each part.
        """
        h = self._run(x.index_select(0, self._order), a) * scaling
        first, rank = 0, a.shape[1] // len(bs)
        for part, b in enumerate(bs):
            product = self._run(h[:, part * rank : (part + 1) * rank].contiguous(), b)
            width = b.shape[1]
            out[:, first : first + width].index_add_(0, self._order, product)
            first += width


def weights(
    module: Module, ranks: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Random A and Bs of all adapters, in buffers of the largest rank."""
    most, parts = max(ranks), len(module.widths)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=torch.bfloat16)

    return random(len(ranks), parts * most, module.in_features), [
        random(len(ranks), width, most) for width in module.widths
    ]


def seconds(decode: Decode) -> float | None:
    """Seconds a layer of all modules, launched one by one; None where FlashInfer cannot be had or does not run."""
    if available() != NAME:
        return None
    how, ranks, picks = decode.how, decode.ranks, decode.picks
    gemm = _import()(torch.empty(WORKSPACE, dtype=torch.int8, device=how.device))
    product = Product(gemm, picks, how.device)
    work = [
        (decode.xs[module.name], decode.outs[module.name], *weights(module, ranks, how.device))
        for module in decode.shape.modules
        for _ in range(decode.layers)
    ]

    def run() -> None:
        for x, out, a, bs in work:
            product.add(x, out, a, bs, 0.5)

    try:
        return how.seconds(run, graph=False) / decode.layers
    except Exception as error:  # its kernels are compiled on first use, which a machine may not be able to
        print(f"{NAME}: not compared: {error}")
        return None
