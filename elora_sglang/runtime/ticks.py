"""What only one rank can know, gathered once per scheduler iteration and used by all.

A :class:`Tick` carries the time, the copies that finished and refined costs. With one rank it is taken and used
at once; with several, tp rank 0 puts it on SGLang's broadcast of requests, and every rank uses what arrived,
so all of them decide the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from elora_sglang.core.costs import Costs

#: Seconds between ticks while nothing happens: the event loop spins, the trace should not.
IDLE_INTERVAL = 0.02


@dataclass(frozen=True)
class Tick:
    """One tick: seconds since the server's start, ended transfers with their outcome, and new costs."""

    now: float
    finished: tuple[tuple[int, bool], ...] = ()
    costs: Costs | None = None


class TickSource:
    """Makes ticks on tp rank 0 and hands them out in order.

    Args:
        finished: the transfers that ended since the last call, with their outcome.
        costs: refined costs when there are any.
        shared: several ranks: ticks arrive by broadcast only.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        finished: Callable[[], list[tuple[int, bool]]],
        costs: Callable[[], Costs | None],
        *,
        shared: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.shared = shared
        #: Ticks that were broadcast and not used yet.
        self.arrived: list[Tick] = []
        #: Whether something happens: then every iteration ticks. Set by the cache.
        self.busy = True
        self._finished, self._costs, self._clock = finished, costs, clock
        self._start = clock()
        self._last = float("-inf")

    def take(self) -> list[Tick]:
        """A tick, or none when nothing has happened for less than ``IDLE_INTERVAL``."""
        now = self._clock() - self._start
        finished = tuple(self._finished())
        if not finished and not self.busy and now - self._last < IDLE_INTERVAL:
            return []
        self._last = now
        return [Tick(now, finished, self._costs())]

    def due(self) -> list[Tick]:
        """The ticks to use in this iteration, oldest first."""
        if not self.shared:
            return self.take()
        ticks, self.arrived = self.arrived, []
        return ticks
