"""Byte views of the KV token pool that adapters share with tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from elora_sglang.kernels.page_copy.rows import Rows
from elora_sglang.runtime.pool.layout import ALIGNMENT


class UnifiedPool:
    """SGLang's per-layer K and V buffers, seen as rows of bytes.

    Holds views, never a copy: whatever is written here is in the pool. The stored type (bf16, fp16,
    fp32, fp8 kept as uint8) does not matter, so fp32 weights stay exact in a pool of any type.

    Args:
        k_buffer, v_buffer: per layer ``[rows, heads, head_dim]``, contiguous, rows = slots incl. the
            dummy page. K and V may have different head sizes, layers may not differ.
        page_size: slots per page.

    Raises:
        ValueError: a layout that cannot hold adapters; the message says which.
    """

    def __init__(
        self, k_buffer: Sequence[torch.Tensor], v_buffer: Sequence[torch.Tensor], *, page_size: int
    ) -> None:
        if not k_buffer or len(k_buffer) != len(v_buffer):
            raise ValueError(
                f"elora: the KV pool has {len(k_buffer)} K and {len(v_buffer)} V buffers; "
                "one of each per layer is needed (MLA and hybrid models are not supported)"
            )
        self.page_size = page_size
        self.num_layers = len(k_buffer)
        self.device = k_buffer[0].device
        self.rows = int(k_buffer[0].shape[0])
        self._rows_2d: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._words: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._flat: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer, (k, v) in enumerate(zip(k_buffer, v_buffer, strict=True)):
            k_rows, v_rows = _byte_rows(k, f"K buffer {layer}"), _byte_rows(v, f"V buffer {layer}")
            if k_rows.shape[0] != self.rows or v_rows.shape[0] != self.rows:
                raise ValueError(
                    f"elora: KV buffers of layer {layer} have another number of slots than layer 0"
                )
            self._rows_2d.append((k_rows, v_rows))
            self._words.append((k_rows.view(torch.int64), v_rows.view(torch.int64)))
            self._flat.append((k_rows.view(-1), v_rows.view(-1)))
        self.row_bytes: tuple[int, int] = self._row_bytes(0)
        for layer in range(self.num_layers):
            if self._row_bytes(layer) != self.row_bytes:
                raise ValueError(
                    f"elora: layer {layer} has KV rows of {self._row_bytes(layer)} bytes, layer 0 of "
                    f"{self.row_bytes}; models with different KV shapes per layer are not supported"
                )

    def _row_bytes(self, layer: int) -> tuple[int, int]:
        k, v = self._rows_2d[layer]
        return int(k.shape[1]), int(v.shape[1])

    def byte_rows(self, layer: int, stream: int) -> torch.Tensor:
        """All K (``stream`` 0) or V (1) rows of a layer: uint8 view ``[rows, row_bytes[stream]]``."""
        return self._rows_2d[layer][stream]

    def word_rows(self, layer: int, stream: int) -> torch.Tensor:
        """The same rows as :meth:`byte_rows` in 8-byte words, int64 view: rows are copied faster this way."""
        return self._words[layer][stream]

    @cached_property
    def copy_rows(self) -> Rows:
        """The same rows for the copy kernel of the GPU that reads or writes them (host pools: the current one)."""
        device = self.device if self.device.type == "cuda" or not torch.cuda.is_available() else "cuda"
        return Rows(self._words, device)

    def byte_run(self, layer: int, stream: int, first_slot: int, offset: int, size: int) -> torch.Tensor:
        """``size`` bytes from byte ``offset`` of the run of slots starting at ``first_slot``: uint8 view."""
        start = first_slot * self.row_bytes[stream] + offset
        return self._flat[layer][stream][start : start + size]


def _byte_rows(buffer: torch.Tensor, what: str) -> torch.Tensor:
    """uint8 view ``[rows, bytes per row]`` of one KV buffer; raises when it is not slot-major."""
    if buffer.dim() != 3 or not buffer.is_contiguous():
        raise ValueError(
            f"elora: {what} has shape {tuple(buffer.shape)}, strides {buffer.stride()}; adapters need the "
            "default layout [slots, heads, head_dim], contiguous (no HND, vectorised or fp4 KV layout)"
        )
    rows = buffer.view(torch.uint8).view(buffer.shape[0], -1)
    if rows.shape[1] % ALIGNMENT:
        raise ValueError(
            f"elora: {what} has rows of {rows.shape[1]} bytes, not a multiple of {ALIGNMENT}; "
            "use a KV dtype or --tp-size with larger rows"
        )
    return rows
