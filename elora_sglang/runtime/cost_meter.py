"""What things cost on this machine: measured at start-up, refined while serving.

Only tp rank 0's meter is ever read: its :class:`~elora_sglang.core.costs.Costs` reach the other ranks, and the
decisions, as part of a tick.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from elora_sglang.core.costs import Costs

#: Prefill batches below this many tokens measure the start of a forward rather than its tokens.
LEAST_TOKENS = 48

#: Weight of what was measured so far when one more batch or read is added.
MEMORY = 0.9

#: Refined costs are announced when a figure moved by more than this factor.
WORTH_TELLING = 1.15


class CostMeter:
    """Keeps one :class:`Costs` up to date. Reads no clock: the caller measures.

    Args:
        costs: what to start from.
        fixed_links: leave both link bandwidths as they are (an emulated link is known, not measured).
    """

    def __init__(self, costs: Costs, *, fixed_links: bool = False) -> None:
        self.told = costs
        self._fixed_links = fixed_links
        self._prefill = [0.0, 0.0]  # seconds, tokens
        self._disk = [0.0, 0.0]  # seconds, bytes
        self._last_done = 0.0

    def prefill(self, launched: float, done: float, tokens: int) -> None:
        """A prefill batch of ``tokens`` was launched and its result known at these times (seconds).

        With the overlap scheduler a batch runs from the later of its launch and its predecessor's end.
        """
        seconds = done - max(launched, self._last_done)
        self._last_done = done
        if tokens >= LEAST_TOKENS and seconds > 0:
            _add(self._prefill, seconds, tokens)

    def decode(self, done: float) -> None:
        """Any other batch ended at ``done``."""
        self._last_done = done

    def read(self, seconds: float, size: int) -> None:
        """An adapter of ``size`` bytes was read from its file in ``seconds``."""
        if size > 0 and seconds > 0:
            _add(self._disk, seconds, size)

    def news(self, load_bytes_s: float | None, save_bytes_s: float | None) -> Costs | None:
        """The refined costs, if a figure moved enough since the last ones that were told; else ``None``.

        ``load_bytes_s``, ``save_bytes_s``: the links as measured, ``None`` when unknown.
        """
        now: dict[str, Any] = {}
        if self._prefill[0] > 0:
            now["prefill_token_s"] = self._prefill[0] / self._prefill[1]
        if self._disk[0] > 0:
            now["disk_bytes_s"] = self._disk[1] / self._disk[0]
        if not self._fixed_links:
            for name, value in (("load_bytes_s", load_bytes_s), ("save_bytes_s", save_bytes_s)):
                if value:
                    now[name] = value
        moved = {name: value for name, value in now.items() if _differs(value, getattr(self.told, name))}
        if not moved:
            return None
        self.told = dataclasses.replace(self.told, **moved)
        return self.told


def _add(sums: list[float], seconds: float, amount: float) -> None:
    sums[0] = MEMORY * sums[0] + seconds
    sums[1] = MEMORY * sums[1] + amount


def _differs(one: float, other: float) -> bool:
    return other <= 0 or not 1 / WORTH_TELLING < one / other < WORTH_TELLING
