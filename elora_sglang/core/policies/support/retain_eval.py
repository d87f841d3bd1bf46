"""The score of the paper (arXiv 2505.03756, Eq. 3-6), in logarithms and for both readings.

``Eval_i = LoRA_Eval_i * cost_i * visit_i * (1 - sigmoid(t_i))``. Its logarithm splits: with ``x = t / tau``,
``log(1 - sigmoid(x)) = -log(1 + e^x) = -x - log(1 + e^-x)``. The first part only moves all nodes down together as time
passes, so ``+t_last / tau`` takes its place without changing the order; the second lies between -log 2 and 0 and
rises with age. Priorities that rise need no re-scoring (see ``Candidates``): the order is exact up to the steps in
which the second part is evaluated, and nothing underflows at any age.
"""

from __future__ import annotations

import math

from elora_sglang.core.policies.base import BasePolicy
from elora_sglang.core.policies.support.adapter_demand import AdapterDemand
from elora_sglang.core.policies.support.reuse_clock import ReuseClock
from elora_sglang.core.tree.node import Node

_LN2 = math.log(2.0)

#: The age correction is evaluated in steps of tau / 8, so that a node's priority changes a bounded number of times.
_STEPS = 8
_CORRECTION = [-math.log2(1.0 + math.exp(-step / _STEPS)) for step in range(12 * _STEPS)]

#: Half-life of the shares of use in Low_lora, in seconds; the paper gives none.
DEMAND_HALF_LIFE_S = 300.0


class LastUse:
    """Of a node: LoRA_Eval in bits, creation or last use on the clock, and in seconds."""

    __slots__ = ("at", "bits", "used")

    def __init__(self, used: float, at: float) -> None:
        self.bits, self.used, self.at = 0.0, used, at


class RetainEval(BasePolicy):
    """Eq. 6; the two readings differ in the class attributes below. ``policy_state``: a :class:`LastUse`.

    Visits count the request that created a node, so that a new node scores above zero.
    """

    #: Seconds on the clock that make one unit of t in the sigmoid.
    tau_s: float
    #: Whether the clock follows the pace of the traffic; else it shows seconds.
    paced: bool
    #: Divide cost by bytes: whole objects of different size compare by what a byte is worth.
    per_byte: bool
    #: +1: an adapter counts more when evicting it leaves too few (the aim). -1: Eq. 4 multiplied as printed.
    sign: int

    def __init__(self) -> None:
        self._demand = AdapterDemand(DEMAND_HALF_LIFE_S)
        self._clock = ReuseClock()

    def _last_use(self, node: Node) -> LastUse:
        last_use: LastUse | None = node.policy_state
        if last_use is None:
            last_use = node.policy_state = LastUse(self._clock.now, self.view.now)
        return last_use

    def priority(self, node: Node) -> float:
        """log2 of Eq. 6, less what all nodes share."""
        off = self.view.switched_off
        last_use: LastUse = node.policy_state or self._last_use(node)
        value = 0.0
        if "cost" not in off:
            value += self._cost_bits(node)
        if "frequency" not in off:
            value += math.log2(1 + node.visits)
        if "recency" not in off:
            value += last_use.used / (self.tau_s * _LN2)
            age = max(self._clock.now - last_use.used, 0.0)
            step = int(age * _STEPS / self.tau_s)
            value += _CORRECTION[step] if step < len(_CORRECTION) else 0.0
        return value + last_use.bits

    def _cost_bits(self, node: Node) -> float:
        if not node.size:
            return 0.0
        costs = self.view.costs
        seconds = node.size * costs.slot_bytes / costs.load_bytes_s
        if not self.per_byte:
            return math.log2(seconds)
        if node.kind == "adapter" and not node.host:
            seconds += costs.disk_s(node.size)
        return math.log2(seconds / (node.size * costs.slot_bytes))

    def _score_adapter(self, node: Node) -> bool:
        """Keep LoRA_Eval (Eq. 4) of ``node`` in bits; whether it fell."""
        last_use = self._last_use(node)
        before = last_use.bits
        short = min(log2_min1(self.view.resident_adapters() - 1, self._demand.low_lora), 0.0)
        if self.sign < 0:
            # As printed the KV's score carries min(1, Now / Low) too; only the difference to it matters.
            short -= min(log2_min1(self.view.resident_adapters(), self._demand.low_lora), 0.0)
        last_use.bits = 0.0 if "pressure" in self.view.switched_off else -self.sign * short
        return last_use.bits < before

    def on_insert(self, node: Node) -> None:
        """An adapter joins those that are scored again in turn."""
        super().on_insert(node)
        self._last_use(node)
        if node.kind == "adapter" and node.size:
            self._demand.resident.add(node)
            if self._score_adapter(node):
                self.view.reprioritize(node)

    def on_use(self, node: Node) -> None:
        """Counts the adapter's share of use, and learns from the gap since the last."""
        now, last_use = self.view.now, self._last_use(node)
        if node.kind == "adapter":
            self._demand.use(node.key, now)
            self._clock.next_request()
        elif self.paced:
            self._clock.used(now - last_use.at, node.visits)
        last_use.used, last_use.at = self._clock.now, now

    def on_split(self, upper: Node, lower: Node) -> None:
        """Both halves were used when the node was; a smaller node costs less."""
        last_use = self._last_use(lower)
        upper.policy_state = LastUse(last_use.used, last_use.at)
        self.view.reprioritize(lower)

    def on_evict(self, node: Node) -> None:
        """An adapter leaves the turn."""
        self._demand.resident.discard(node)

    def on_tick(self) -> None:
        """Goes on with Low_lora, and scores a slice of the adapters again."""
        self._clock.advance(self.view.now)
        self._demand.tick(self.view)
        self._demand.rescore(self.view, self._score_adapter)

    def on_reset(self) -> None:
        """Forgets all shares of use; what was learned about gaps stays."""
        self._demand.clear()


def log2_min1(now: float, low: float) -> float:
    """log2(now / low) with ``now`` at least 1/2 (no adapter left is finite), 0 when nothing is demanded."""
    return math.log2(max(now, 0.5) / low) if low > 0 else 0.0
