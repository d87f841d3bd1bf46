"""Copies in simulated time: one link each way, first in first out, and a disk."""

from __future__ import annotations

import heapq


class Lane:
    """One direction of a link, or a disk: what is started waits for what was started before.

    Attributes:
        free_at: when it will have moved all it was given.
        bytes_moved: of all transfers so far.
    """

    def __init__(self, bytes_s: float, latency_s: float) -> None:
        self._bytes_s, self._latency_s = bytes_s, latency_s
        self.free_at = 0.0
        self.bytes_moved = 0.0

    def start(self, now: float, size: float) -> float:
        """Start moving ``size`` bytes; returns when they have arrived."""
        self.free_at = max(now, self.free_at) + self._latency_s + size / self._bytes_s
        self.bytes_moved += size
        return self.free_at


class InFlight:
    """Transfers that have not arrived yet, the earliest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self.ends: dict[int, float] = {}

    def add(self, transfer: int, ends: float) -> None:
        """A transfer will have arrived at ``ends``."""
        heapq.heappush(self._heap, (ends, transfer))
        self.ends[transfer] = ends

    def arrived(self, now: float) -> list[int]:
        """Take out those that have arrived, in order."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            transfer = heapq.heappop(self._heap)[1]
            del self.ends[transfer]
            found.append(transfer)
        return found

    @property
    def next(self) -> float | None:
        """When the next one arrives."""
        return self._heap[0][0] if self._heap else None
