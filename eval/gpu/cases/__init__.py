"""Fresh random inputs of every op of ``kernels/``, with what must come out: one test and one benchmark run them all.

They stand here and not beside the kernels because adapters have to be packed into a pool first, which is the runtime's
work; the kernels know neither.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from elora_sglang.eval.gpu.cases import page_copy, paged_lora
from elora_sglang.eval.gpu.cases.case import Case

_MAKERS = {"paged_lora": paged_lora.awkward, "page_copy": page_copy.awkward}

#: The ops, by their folders in ``kernels/``.
OPS = tuple(_MAKERS)


def awkward(op: str, seed: int, device: torch.device | str) -> Iterator[Case]:
    """Small cases of an op that are easily done wrong."""
    yield from _MAKERS[op](seed, device)
