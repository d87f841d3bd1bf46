"""Stops a simulated run early that can only end above a limit; a search needs no more of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elora_sglang.eval.sim.server import Server

#: Turns of sessions that go on may be more than were asked for, by this factor at most.
MOST_TURNS = 1.2


class OverLimitError(Exception):
    """The mean TTFT of the run will be above the limit."""


class Limit:
    """Adds up what the requests counted have waited so far; O(waiting requests) a look, a look a second.

    Args:
        mean_s: the limit of the mean TTFT, in seconds.
        warmup_s: what arrived before and was answered is not counted.
        turns: about how many will be counted.
    """

    def __init__(self, mean_s: float, warmup_s: float, turns: int) -> None:
        self._most = mean_s * turns * MOST_TURNS
        self._warmup_s = warmup_s
        self._sum, self._seen, self._next = 0.0, 0, 0.0

    def look(self, server: Server) -> None:
        """Raises :class:`OverLimitError` when waiting so far is more than all requests together may wait."""
        if server.now < self._next:
            return
        self._next = server.now + 1.0
        ended = server.outcome.ended
        for req in ended[self._seen :]:
            if req.arrived >= self._warmup_s:
                self._sum += req.ttft
        self._seen = len(ended)
        # Those of the warm-up delay the others: a queue that long does not go away below the limit.
        waiting = sum(server.now - req.arrived for req in server.waiting)
        if self._sum + waiting > self._most:
            raise OverLimitError
