"""An emulated host-device link: when the bytes of a copy would have arrived. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

#: Directions of a link; each has its own queue, as PCIe has lanes both ways.
LOAD, SAVE = "load", "save"


class Link:
    """Bytes divided by bandwidth, first in first out in each direction; a layer arrives by itself.

    Pure arithmetic on times that the caller passes in, so the same class delays any system: whoever copies
    asks when each layer arrives, goes on computing, and waits only where the copied bytes are needed.

    Args:
        gbps: gigabytes (10^9 bytes) per second in each direction; 0 switches the delay off.

    Raises:
        ValueError: a negative bandwidth.
    """

    __slots__ = ("_busy_until", "gbps")

    def __init__(self, gbps: float) -> None:
        if not gbps >= 0:
            raise ValueError(f"elora: --elora-link-gbps is {gbps}; it must be 0 (off) or above")
        self.gbps = gbps
        self._busy_until = {LOAD: float("-inf"), SAVE: float("-inf")}

    @property
    def bytes_s(self) -> float:
        """Bytes per second in one direction; 0 when the link is off."""
        return self.gbps * 1e9

    def issue(self, direction: str, bytes_per_layer: Sequence[int], now: float) -> list[float]:
        """Queue one copy behind all earlier ones of ``direction`` (``LOAD`` or ``SAVE``). Mutates the queue.

        Returns:
            Per layer the time, in seconds on the caller's clock, at which its last byte has arrived;
            ``now`` for every layer when the link is off.
        """
        if not self.gbps:
            return [now] * len(bytes_per_layer)
        at, rate = max(now, self._busy_until[direction]), self.gbps * 1e9
        arrivals = []
        for size in bytes_per_layer:
            at += size / rate
            arrivals.append(at)
        self._busy_until[direction] = at
        return arrivals
