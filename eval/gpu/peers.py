"""What the paged LoRA kernels are compared with: the same batches on slot buffers of the largest rank.

SGLang's csgmv kernels, and FlashInfer's SegmentGEMM as Punica's LoRA would run on it: rows grouped by adapter, one
grouped product for A, one for each part of B. Each of them where it can be imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elora_sglang.eval.gpu.llama import Module, Shape
from elora_sglang.eval.gpu.timing import Bench

#: Rows of a chunk, SGLang's smallest.
CHUNK = 16
#: Scratch memory of FlashInfer in bytes, as its documentation advises.
WORKSPACE = 128 * 2**20


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


def weights(
    module: Module, ranks: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Random A ``[adapters, parts * rank, in]`` and Bs ``[adapters, width, rank]``, in buffers of the largest rank."""
    most, many = max(ranks), len(ranks)
    a, *bs = (
        torch.randn(many, *size, device=device, dtype=torch.bfloat16)
        for size in ((len(module.widths) * most, module.in_features), *((w, most) for w in module.widths))
    )
    return a, bs


def _grouped(picks: Sequence[int]) -> list[int]:
    """The rows, those of an adapter together."""
    return sorted(range(len(picks)), key=lambda row: (picks[row], row))


def _import_csgmv() -> tuple[Any, ...]:
    from sglang.kernels.ops.lora.dense.chunked_sgmv_expand import chunked_sgmv_lora_expand_forward
    from sglang.kernels.ops.lora.dense.chunked_sgmv_shrink import chunked_sgmv_lora_shrink_forward
    from sglang.srt.lora.utils import LoRABatchInfo

    return chunked_sgmv_lora_shrink_forward, chunked_sgmv_lora_expand_forward, LoRABatchInfo


def _csgmv(decode: Decode) -> Callable[[], None]:
    """Rows grouped by adapter in chunks, one launch for A and one for all parts of B."""
    shrink, expand, info = _import_csgmv()
    device, ranks, picks = decode.how.device, decode.ranks, decode.picks
    bounds, owners = [0], list[int]()
    for adapter, count in sorted(Counter(picks).items()):
        for left in range(count, 0, -CHUNK):
            bounds.append(bounds[-1] + min(CHUNK, left))
            owners.append(adapter)

    def ints(values: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    batch = info(
        use_cuda_graph=False, bs=len(picks), num_segments=len(owners), seg_indptr=ints(bounds),
        weight_indices=ints(owners), lora_ranks=ints([*ranks], torch.int64),
        scalings=torch.full((len(ranks),), 0.5, device=device), max_len=CHUNK, seg_lens=None,
        permutation=ints(_grouped(picks)),
    )  # fmt: skip
    work = []
    for module in decode.shape.modules:
        x, out, parts = decode.xs[module.name], decode.outs[module.name], len(module.widths)
        offsets = ints([sum(module.widths[:part]) for part in range(parts + 1)])
        for _ in range(decode.layers):
            a, bs = weights(module, ranks, device)
            work.append((x, out, a, torch.cat(bs, 1), offsets, max(module.widths), parts))

    def run() -> None:
        for x, out, a, b, offsets, widest, parts in work:
            expand(shrink(x, a, batch, parts), b, batch, offsets, widest, out)

    return run


def _import_segment_gemm() -> Any:
    from flashinfer import SegmentGEMMWrapper

    return SegmentGEMMWrapper


class Product:
    """LoRA of one batch by grouped products.

    Args:
        gemm: ``flashinfer.SegmentGEMMWrapper``, or what computes the same.
        picks: the adapter of each row.
    """

    def __init__(self, gemm: Any, picks: Sequence[int], device: torch.device) -> None:
        self._gemm, counts = gemm, sorted(Counter(picks).items())
        self._order, self._adapters, self._lengths = (
            torch.tensor(numbers, dtype=torch.int64, device=device)
            for numbers in (_grouped(picks), [one for one, _ in counts], [count for _, count in counts])
        )

    def _run(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self._gemm.run(
            x, weights, len(self._lengths), True, seg_lens=self._lengths, weight_indices=self._adapters
        )
        return found

    def add(
        self, x: torch.Tensor, out: torch.Tensor, a: torch.Tensor, bs: Sequence[torch.Tensor], scaling: float
    ) -> None:
        """``out += scaling * B A x``. Mutates ``out``. ``x``, ``out``: ``[rows, in]``, ``[rows, sum of widths]``."""
        h = self._run(x.index_select(0, self._order), a) * scaling
        first = 0
        for rows, b in zip(h.chunk(len(bs), 1), bs, strict=True):
            width = b.shape[1]
            out[:, first : first + width].index_add_(0, self._order, self._run(rows.contiguous(), b))
            first += width


def _segment_gemm(decode: Decode) -> Callable[[], None]:
    device = decode.how.device
    gemm = _import_segment_gemm()(torch.empty(WORKSPACE, dtype=torch.int8, device=device))
    product = Product(gemm, decode.picks, device)
    work = [
        (decode.xs[module.name], decode.outs[module.name], *weights(module, decode.ranks, device))
        for module in decode.shape.modules
        for _ in range(decode.layers)
    ]

    def run() -> None:
        for x, out, a, bs in work:
            product.add(x, out, a, bs, 0.5)

    return run


@dataclass(frozen=True)
class Peer:
    """One of those that we compare with.

    Attributes:
        on_cpu: why it is not compared without a GPU.
        load: imports what it needs.
        build: what is timed.
        graph: whether its launches can be captured; else they are launched one by one.
    """

    name: str
    on_cpu: str
    load: Callable[[], Any]
    build: Callable[[Decode], Callable[[], None]]
    graph: bool

    def available(self) -> str:
        """Its name, or why it is not compared."""
        if not torch.cuda.is_available():
            return f"not compared: {self.on_cpu}"
        try:
            self.load()
        except ImportError as error:
            return f"not compared: {error}"
        return self.name

    def seconds(self, decode: Decode) -> float | None:
        """Seconds a layer of all modules; None where it cannot be had or, without a graph, does not run."""
        if self.available() != self.name:
            return None
        run = self.build(decode)
        try:
            return decode.how.seconds(run, graph=self.graph) / decode.layers
        except Exception as error:  # kernels compiled on first use, which a machine may not be able to
            if self.graph:
                raise
            print(f"{self.name}: not compared: {error}")
            return None


CSGMV = Peer("csgmv", "SGLang chooses csgmv's sizes by the name of the GPU", _import_csgmv, _csgmv, True)
SEGMENT_GEMM = Peer(
    "FlashInfer SegmentGEMM", "no CUDA device", _import_segment_gemm, _segment_gemm, graph=False
)
