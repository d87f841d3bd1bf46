"""The same batches by SGLang's csgmv kernels on slot buffers of the largest rank, where they can be imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elora_sglang.eval.gpu.llama import Shape
from elora_sglang.eval.gpu.timing import Bench

#: Rows of a chunk, SGLang's smallest.
CHUNK = 16


@dataclass(frozen=True)
class Decode:
    """What is timed: a decode batch through all modules of some layers, one layer after the other.

    ``ranks``: LoRA rank of each adapter. ``picks``: the adapter of each row. ``xs``, ``outs``: ``[rows, features]`` by
    module.
    """

    how: Bench
    shape: Shape
    ranks: Sequence[int]
    picks: Sequence[int]
    xs: Mapping[str, torch.Tensor]
    outs: Mapping[str, torch.Tensor]
    layers: int


def _import() -> tuple[Any, Any, Any]:
    from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import chunked_sgmv_lora_expand_forward
    from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import chunked_sgmv_lora_shrink_forward
    from sglang.srt.lora.utils import LoRABatchInfo

    return chunked_sgmv_lora_shrink_forward, chunked_sgmv_lora_expand_forward, LoRABatchInfo


def available() -> str:
    """ "csgmv", or why it is not compared."""
    if not torch.cuda.is_available():
        return "not compared: SGLang chooses csgmv's sizes by the name of the GPU"
    try:
        _import()
    except ImportError as error:
        return f"not compared: {error}"
    return "csgmv"


def segments(picks: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Rows grouped by adapter in chunks: order of the rows, chunk boundaries, adapter of each chunk."""
    order = sorted(range(len(picks)), key=lambda row: (picks[row], row))
    bounds: list[int] = [0]
    owners: list[int] = []
    for at, row in enumerate(order):
        new = not owners or picks[row] != owners[-1] or at - bounds[-1] == CHUNK
        if new:
            if owners:
                bounds.append(at)
            owners.append(picks[row])
    if owners:
        bounds.append(len(order))
    return order, bounds, owners


def seconds(decode: Decode) -> float | None:
    """Seconds a layer of all modules; None where SGLang's kernels cannot be had."""
    if available() != "csgmv":
        return None
    shrink, expand, info = _import()
    how, ranks, picks = decode.how, decode.ranks, decode.picks
    most = max(ranks)
    order, bounds, owners = segments(picks)

    def ints(values: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=how.device)

    batch = info(
        use_cuda_graph=False, bs=len(picks), num_segments=len(owners), seg_indptr=ints(bounds),
        weight_indices=ints(owners), lora_ranks=ints([*ranks], torch.int64),
        scalings=torch.full((len(ranks),), 0.5, device=how.device), max_len=CHUNK, seg_lens=None,
        permutation=ints(order),
    )  # fmt: skip
    work = []
    for module in decode.shape.modules:
        parts = len(module.widths)
        edges = [sum(module.widths[:part]) for part in range(parts + 1)]
        offsets = ints(edges)
        for _ in range(decode.layers):
            a = torch.randn(
                len(ranks), parts * most, module.in_features, device=how.device, dtype=torch.bfloat16
            )
            b = torch.randn(len(ranks), edges[-1], most, device=how.device, dtype=torch.bfloat16)
            work.append(
                (decode.xs[module.name], decode.outs[module.name], a, b, offsets, max(module.widths), parts)
            )

    def run() -> None:
        for x, out, a, b, offsets, widest, parts in work:
            expand(shrink(x, a, batch, parts), b, batch, offsets, widest, out)

    return how.seconds(run) / decode.layers
