"""The rows of a pool as copies see them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

#: Bytes of one load.
ALIGNMENT = 16


class Rows:
    """K and V rows of every layer.

    Args:
        layers: per layer the K and the V rows as int64 words, ``[slots, words]``, contiguous; all layers alike, as
            ``UnifiedPool.word_rows`` gives them.
        device: that copies; pinned host memory is in its address space.

    Raises ValueError for rows that are not contiguous, or differ between layers.
    """

    def __init__(
        self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], device: torch.device | str
    ) -> None:
        self.layers, self.device = list(layers), torch.device(device)
        shapes = [tuple(rows.shape[1] for rows in pair) for pair in self.layers]
        if not shapes or len(set(shapes)) != 1:
            raise ValueError(f"rows of one size in every layer are needed, got {sorted(set(shapes))}")
        for pair in self.layers:
            for rows in pair:
                if rows.dtype != torch.int64 or not rows.is_contiguous() or rows.data_ptr() % ALIGNMENT:
                    raise ValueError(f"rows must be contiguous int64 words at multiples of {ALIGNMENT} bytes")
        self.words: tuple[int, int] = (shapes[0][0], shapes[0][1])

    @property
    def base(self) -> torch.Tensor:
        """What :attr:`places` count from."""
        return self.layers[0][0]

    @cached_property
    def places(self) -> torch.Tensor:
        """int64 ``[layers, 2]`` on the device that copies: words from the base to each layer's rows."""
        start = self.base.data_ptr()
        found = [[(rows.data_ptr() - start) // rows.element_size() for rows in pair] for pair in self.layers]
        return torch.tensor(found, dtype=torch.int64, device=self.device)
