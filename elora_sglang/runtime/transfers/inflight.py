"""Which slots of one tier are being read or written by copies in flight."""

from __future__ import annotations

import numpy as np
import torch


class SlotsInFlight:
    """Per slot: the copy that writes it, and how many copies read it. ``rows``: slots of the tier."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._writer = torch.zeros(rows, dtype=torch.int64)  # serial number of the copy, 0: none
        self._readers = torch.zeros(rows, dtype=torch.int16)
        self._place = np.zeros(rows, dtype=np.int64)

    def fault(self, slots: torch.Tensor, *, distinct: bool) -> str | None:
        """What is wrong with ``slots`` as a list of this tier, or None. ``distinct``: none may occur twice."""
        if slots.dim() != 1 or slots.dtype != torch.int64:
            return f"a slot list must be int64 [n], not {slots.dtype} {tuple(slots.shape)}"
        if not slots.numel():
            return None
        numbers = slots.numpy()  # the same memory; numpy starts an operation several times faster
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= self.rows:
            return f"slots {low}..{high} are outside {self.rows}"
        if distinct:
            index = np.arange(len(numbers))
            self._place[numbers] = index
            if not np.array_equal(self._place[numbers], index):
                return "a slot occurs twice among those written"
        return None

    def writers(self, slots: torch.Tensor) -> list[int]:
        """Serial numbers of the copies that write any of ``slots``, ascending."""
        found = self._writer[slots]
        return [serial for serial in found.unique().tolist() if serial] if bool(found.any()) else []

    def read(self, slots: torch.Tensor) -> bool:
        """Whether a copy reads any of ``slots``."""
        return bool(self._readers[slots].any())

    def begin(self, slots: torch.Tensor, serial: int, *, write: bool) -> None:
        if write:
            self._writer[slots] = serial
        else:
            self._readers.index_add_(0, slots, torch.ones(len(slots), dtype=torch.int16))

    def end(self, slots: torch.Tensor, *, write: bool) -> None:
        if write:
            self._writer[slots] = 0
        else:
            self._readers.index_add_(0, slots, torch.full((len(slots),), -1, dtype=torch.int16))

    def reading(self) -> frozenset[int]:
        return frozenset(self._readers.nonzero().flatten().tolist())

    def writing(self) -> frozenset[int]:
        return frozenset(self._writer.nonzero().flatten().tolist())
