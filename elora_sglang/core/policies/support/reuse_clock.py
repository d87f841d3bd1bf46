"""A clock that runs at the pace of the traffic: the half-life of uses follows the gaps between them.

A use is worth half after about twice the median gap between the turns of a conversation, and what that is in seconds
depends on who is served: minutes for people who type, a second for agents and for benchmarks. With a half-life that is
much too long, conversations that are over crowd out those that go on; with one that is much too short, nothing but
recency counts. So the half-life is learned, and *time* is measured in it: while it is H seconds, a second adds
``STANDARD_S / H`` to :attr:`ReuseClock.now`. Uses fade with a fixed half-life of ``STANDARD_S`` on this clock, so the
order of nodes that are not used never changes, however the pace does.
"""

from __future__ import annotations

import math

#: The half-life on this clock, and in seconds as long as nothing is known (a study on the Mooncake traces).
STANDARD_S = 300.0

#: Half-lives in seconds that are ever used.
SHORTEST_S, LONGEST_S = 1.0, 3600.0

#: Uses that are closer are of one moment, by requests that begin alike: no turns of a conversation.
LEAST_GAP_S = 0.1

#: Half-life over median gap.
GAPS = 2.0

#: KV that was used more often is shared by conversations, and says nothing about the gap between the turns of one.
MOST_TURNS = 16

#: Gaps that must have been seen before the first half-life is learned.
LEAST_GAPS = 16

#: Time also moves in steps of at least so many seconds, for what would otherwise change all the time.
STEP_S = 10.0

#: Least step of the median, in bits; the first steps are larger.
STEP = 1.0 / 64.0


class ReuseClock:
    """Learns the median gap by stochastic approximation: a step up or down for each gap. O(1) an operation.

    Attributes:
        now: time on this clock.
        half_life_s: what :data:`STANDARD_S` on this clock is in seconds now.
        step_second, step_now: second and time when the current step of :data:`STEP_S` began.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.half_life_s = STANDARD_S
        self.step_second = self.step_now = 0.0
        self._seconds = 0.0
        self._median = math.log2(STANDARD_S / GAPS)
        self._seen = 0
        self._gap: float | None = None

    def used(self, gap_s: float, uses: int) -> None:
        """The request being admitted found KV last used ``gap_s`` seconds ago, ``uses`` times with this one.

        Told of all KV on its way from the top down: the gap of the deepest is learned, once the next request begins.
        """
        if uses <= MOST_TURNS:
            self._gap = gap_s

    def next_request(self) -> None:
        """The last request's KV has all been told."""
        gap, self._gap = self._gap, None
        if gap is not None:
            self.observe(gap)

    def advance(self, seconds: float) -> None:
        """It is second ``seconds`` now, on a clock that never goes back."""
        self.next_request()
        self.now += (seconds - self._seconds) * (STANDARD_S / self.half_life_s)
        self._seconds = seconds
        if seconds - self.step_second >= STEP_S:
            self.step_second, self.step_now = seconds, self.now

    def observe(self, gap_s: float) -> None:
        """A conversation went on ``gap_s`` seconds after it was used last."""
        if gap_s < LEAST_GAP_S:
            return
        self._seen += 1
        step = max(STEP, 8.0 / (8.0 + self._seen))
        self._median += step if math.log2(gap_s) > self._median else -step
        if self._seen >= LEAST_GAPS:
            self.half_life_s = min(max(GAPS * 2.0**self._median, SHORTEST_S), LONGEST_S)
