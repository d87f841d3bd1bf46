"""Row copies in plain PyTorch, on any devices."""

from __future__ import annotations

import torch

from elora_sglang.kernels.page_copy.rows import Rows


def copy_rows(
    source: Rows, target: Rows, source_slots: torch.Tensor, target_slots: torch.Tensor, layers: range
) -> None:
    """Copy row by row, see the package. Mutates ``target``. Raises ValueError where row sizes differ."""
    if source.words != target.words:
        raise ValueError(f"rows of {source.words} words do not fit rows of {target.words}")
    for layer in layers:
        for there, here in zip(source.layers[layer], target.layers[layer], strict=True):
            rows = there.index_select(0, source_slots.to(there.device, torch.int64))
            here.index_copy_(0, target_slots.to(here.device, torch.int64), rows.to(here.device))
