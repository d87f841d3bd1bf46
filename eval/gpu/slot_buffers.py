"""The same batches by SGLang's csgmv kernels on slot buffers of the largest rank, where they can be imported."""

from __future__ import annotations

from collections import Counter
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
    bounds, owners = [0], list[int]()
    for adapter, count in sorted(Counter(picks).items()):
        for left in range(count, 0, -CHUNK):
            bounds.append(bounds[-1] + min(CHUNK, left))
            owners.append(adapter)
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

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=how.device, dtype=torch.bfloat16)

    work = []
    for module in decode.shape.modules:
        x, out, parts = decode.xs[module.name], decode.outs[module.name], len(module.widths)
        edges = [sum(module.widths[:part]) for part in range(parts + 1)]
        offsets, widest = ints(edges), max(module.widths)
        for _ in range(decode.layers):
            a = random(len(ranks), parts * most, module.in_features)
            b = random(len(ranks), edges[-1], most)
            work.append((x, out, a, b, offsets, widest, parts))

    def run() -> None:
        for x, out, a, b, offsets, widest, parts in work:
            expand(shrink(x, a, batch, parts), b, batch, offsets, widest, out)

    return how.seconds(run) / decode.layers
