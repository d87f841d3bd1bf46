"""What policy ``elora`` knows of one node, and the figures it is built on."""

from __future__ import annotations

import math

from elora_sglang.core.costs import Costs
from elora_sglang.core.policies.support.reuse_clock import STANDARD_S, STEP_S, ReuseClock
from elora_sglang.core.tree.node import Node

#: How many times more slowly than recency the number of uses fades: who came back often comes back again, even after
#: a long pause (eval/JOURNAL.md has what was tried).
COUNT_FADE = 8.0

#: Session name of nodes that more than one session used.
SHARED = ""

#: Below every other priority, above minus infinity: where ended sessions go.
BOTTOM = -1e9

_LN2 = math.log(2.0)

#: In place of a figure that is not known.
NEVER = -math.inf


class ReuseState:
    """What the policy keeps about one node.

    Attributes:
        weight, used: uses ``w``, as of ``used``, the last one, on the reuse clock.
        weight_bits: log2 of ``weight``, which is asked for far more often than it changes.
        at: second of the last use.
        start: tokens before the node (KV).
        clean_bits, dirty_bits, host_bits: log2 of the seconds per byte that keeping saves: device with and without
            a host copy behind it, host.
        floor: an adapter is at least as probable as the KV below it: the largest such figure.
        extra: an adapter's bits for waiting requests and for too few adapters on the device.
        expected, expected_until: second of a hinted return, and until when it is waited for; 0: none.
        expected_half_life_s: H when the hint came.
        bias: bits by the return predictor since the last use.
        ended: a hint said that only an ended session needs it.
        session: the one session that used it, ``SHARED``, or ``None`` when unknown.
        priced_by: the costs that its bits follow from; ``None``: they have to be worked out.
    """

    __slots__ = (
        "at",
        "bias",
        "clean_bits",
        "dirty_bits",
        "ended",
        "expected",
        "expected_half_life_s",
        "expected_until",
        "extra",
        "floor",
        "host_bits",
        "priced_by",
        "session",
        "start",
        "used",
        "weight",
        "weight_bits",
    )

    def __init__(self, weight: float, used: float, at: float) -> None:
        self.weight = weight
        self.weight_bits = math.log2(weight)
        self.used = used
        self.at = at
        self.start = 0
        self.clean_bits = self.dirty_bits = self.host_bits = 0.0
        self.floor = NEVER
        self.extra = self.bias = self.expected = self.expected_until = 0.0
        self.expected_half_life_s = STANDARD_S
        self.ended = False
        self.session: str | None = None
        self.priced_by: Costs | None = None

    def copy(self) -> ReuseState:
        """The same figures for the other half of a split node."""
        other = ReuseState(self.weight, self.used, self.at)
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        return other

    def use(self, clock: ReuseClock, now: float) -> None:
        """One use more at second ``now``; hints and predictions about it have been answered."""
        self.weight = 1.0 + self.weight * math.pow(2.0, -(clock.now - self.used) / (COUNT_FADE * STANDARD_S))
        self.weight_bits = math.log2(self.weight)
        self.used, self.at = clock.now, now
        self.expected = self.expected_until = self.bias = 0.0
        self.ended = False

    def price(self, node: Node, costs: Costs) -> None:
        """Seconds per byte that keeping ``node`` saves, by today's costs: the cheapest way back if it goes.

        Whoever changes what else they follow from, the node's size or ``start``, clears ``priced_by``.
        """
        if not node.size or costs is self.priced_by:
            return
        self.priced_by = costs
        size = node.size * costs.slot_bytes
        load = costs.load_s(node.size)
        if node.kind == "kv":
            again = costs.recompute_s(self.start, node.size)
            clean, dirty = min(load, again), again
        else:
            clean, dirty = load, load + costs.disk_s(node.size)
        self.clean_bits = math.log2(clean / size)
        self.dirty_bits = math.log2(dirty / size)
        self.host_bits = math.log2(max(dirty - clean, 1e-3 * dirty) / size)

    def probability_bits(self, frequency: bool, recency: bool, clock: ReuseClock) -> float:
        """log2 of how soon a use is expected; only differences between nodes mean anything.

        ``log2(w) + t_last / H``, with w as of the last use: this order never changes by waiting. A use is worth half
        after H, like something that returns at a rate of ``ln 2 / H``, so a return expected in r seconds counts like
        ``H / (r * ln 2)`` uses. That only rises with time, whatever H becomes meanwhile, and in steps, which an
        eviction heap that only looks at its lowest can bear.
        """
        own = (self.weight_bits if frequency else 0.0) + self.bias
        if recency:
            own += self.used / STANDARD_S
        if self.expected_until:
            wait = max(self.expected - clock.step_second, STEP_S)
            hinted = math.log2(self.expected_half_life_s / _LN2 / wait)
            own = max(own, hinted + (clock.step_now / STANDARD_S if recency else 0.0))
        return own if own >= self.floor else self.floor
