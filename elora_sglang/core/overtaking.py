"""Who may pass whom in the queue, so that the wait for an adapter stays within twice the wait in queue order.

An example, batch by batch, and the proof are in ``docs/overtaking.md``. In short:

* Time is counted in batches. A request's *clock* starts when it is queued, if its adapter is not there then; else
  when it is first passed over.
* *Lag* counts the batches that queue order (FCFS) would not have needed: prefills of overtakers alone, and decodes in
  which the first of the queue lacks only what its overtakers hold.
* Rule 1: where the first of the queue would fit without its overtakers, nobody passes.
* Rule 2: else a request may pass if, for every running clock r, w batches after its start,
  ``harm + 2 lag_r <= w + 1``. Harm is the most batches until it and all overtakers that run are over.

Then r waits at most twice as long as in queue order from the state in which its clock started.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable


class Overtaking:
    """The bookkeeping of the two rules. Deterministic: the same calls give the same answers on every rank.

    A pass asks :meth:`stopped` at the first request that it cannot admit, then :meth:`may_pass` for each one
    behind. Calls cost O(log n) of the requests that wait, :meth:`stopped` and :meth:`overtakers` O(overtakers).

    Attributes:
        batches: batches that ran since start.
        lag: those of them that FCFS would not have needed.
        passes: admissions out of turn since start.
    """

    def __init__(self) -> None:
        self.batches = 0
        self.lag = 0
        self.passes = 0
        self._next_ticket = 1
        #: Requests that wait, by id, in order of arrival.
        self._waiting: dict[str, int] = {}
        #: ``batches - 2 * lag`` when a waiting request's clock started, and the latest starts first.
        self._clocks: dict[str, int] = {}
        self._latest: list[tuple[int, str]] = []
        #: Overtakers that run: their ticket, and the decode batch after which they are over at the latest.
        self._overtakers: dict[str, tuple[int, int]] = {}
        self._decodes = 0
        #: Prefill batches that overtakers admitted so far may still need.
        self._chunks = 0
        #: Decode batches until those are over that overtook the request at which this pass stopped.
        self._tokens = 0
        self._fcfs_waits = self._for_copy = False

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    def queue(self, rid: str, *, for_adapter: bool) -> None:
        """A request is queued, or queued again after a retraction, behind all others.

        Args:
            for_adapter: its adapter is not there, so its clock starts now.
        """
        self.leave(rid)
        self._overtakers.pop(rid, None)
        self._waiting[rid] = self._next_ticket
        self._next_ticket += 1
        if for_adapter:
            self.passed_over(rid)

    def passed_over(self, rid: str) -> None:
        """A waiting request cannot be admitted because of its adapter: its clock starts unless it runs."""
        if rid in self._waiting and rid not in self._clocks:
            self._clocks[rid] = start = self.batches - 2 * self.lag
            heapq.heappush(self._latest, (-start, rid))

    def leave(self, rid: str) -> None:
        """A request waits no more, whatever for; nothing happens if it did not wait."""
        self._waiting.pop(rid, None)
        if self._clocks.pop(rid, None) is not None and len(self._latest) > 2 * len(self._clocks) + 64:
            self._latest = [(-start, other) for other, start in self._clocks.items()]
            heapq.heapify(self._latest)

    def admit(self, rid: str, *, chunks: int, tokens: int, passing: bool) -> None:
        """A waiting request is admitted.

        Args:
            chunks: prefill batches it takes at most.
            tokens: decode batches it takes at most, as far as they can delay the one that is passed.
            passing: the pass stopped at another request before it.
        """
        ticket = self._waiting.get(rid)
        self.leave(rid)
        if passing and ticket is not None:
            self.passes += 1
            self._overtakers[rid] = (ticket, self._decodes + tokens)
            self._chunks = max(self._chunks, chunks)
            self._tokens = max(self._tokens, tokens)

    def begin_pass(self, running: Collection[str]) -> None:
        """A pass over the queue begins while ``running`` run, which may be behind by one batch."""
        if self._overtakers:
            self._overtakers = {rid: o for rid, o in self._overtakers.items() if rid in running}
        self._fcfs_waits = self._for_copy = False
        self._tokens = 0
        if not self._overtakers:
            self._chunks = 0

    def overtakers(self, rid: str) -> list[str]:
        """Those that run, came after waiting request ``rid`` and were admitted before it."""
        ticket = self._waiting.get(rid, self._next_ticket)
        return [other for other, (theirs, _) in self._overtakers.items() if theirs > ticket]

    def stopped(self, rid: str, *, fcfs_waits: bool, for_copy: bool = False) -> None:
        """This pass cannot admit waiting request ``rid``, the first of its kind.

        Args:
            fcfs_waits: it could not be admitted without its overtakers either. This stays so until the next
                pass, which comes as soon as anybody ends.
            for_copy: it waits for a copy, which may end in the next batch.
        """
        ticket = self._waiting.get(rid, self._next_ticket)
        ends = (last for theirs, last in self._overtakers.values() if theirs > ticket)
        self._tokens = max(max(ends, default=0) - self._decodes, 0)
        self._fcfs_waits, self._for_copy = fcfs_waits, for_copy

    def may_pass(self, rid: str | None, *, chunks: int, tokens: int) -> bool:
        """Whether waiting request ``rid`` may be admitted though the pass stopped before it.

        ``None`` asks whether anybody with so few batches may. Arguments as for :meth:`admit`; changes nothing.
        """
        if not self._fcfs_waits:
            return False
        start = self._latest_start(rid)
        if start is None:
            return True
        harm = max(self._chunks, chunks) + max(self._tokens, tokens)
        return harm <= self.batches - 2 * self.lag - start + 1

    def _latest_start(self, excluded: str | None) -> int | None:
        """The latest start of a running clock but ``excluded``'s, whose request has the least slack."""
        heap, aside, found = self._latest, None, None
        while heap:
            start, rid = -heap[0][0], heap[0][1]
            if self._clocks.get(rid) != start:
                heapq.heappop(heap)  # left, or queued again
            elif rid == excluded:
                aside = heapq.heappop(heap)
            else:
                found = start
                break
        if aside is not None:
            heapq.heappush(heap, aside)
        return found

    def batch(self, rids: Iterable[str], *, prefill: bool, decode: bool) -> None:
        """A batch of ``rids`` is about to run: logical time goes on. Mixed ones are both prefill and decode."""
        self.batches += 1
        fcfs_waits = self._fcfs_waits
        if self._for_copy:
            self._fcfs_waits = False
        if prefill:
            self._chunks = max(self._chunks - 1, 0)
        if decode:
            self._decodes += 1
        if not self._clocks or not self._overtakers:
            return
        if prefill and not decode:
            self.lag += all(rid in self._overtakers for rid in rids)
        elif not fcfs_waits:
            first = next(iter(self._waiting.values()))
            self.lag += any(ticket > first for ticket, _ in self._overtakers.values())
