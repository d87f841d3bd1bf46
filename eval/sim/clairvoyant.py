"""The clairvoyant reference: evicts leaves by next use and the cost to restore them, knowing the future.

It respects the dependency tree and uses the same swapper as every policy. Not a bound: a greedy choice of leaves is
not optimal, and the time of closed-loop turns is nominal (see :mod:`.future`).
"""

from __future__ import annotations

import math

from elora_sglang.core.policies.base import BasePolicy
from elora_sglang.core.tree.node import Node
from elora_sglang.eval.sim.future import Future

_NEVER = -1e9
#: What waits now is this close, in seconds.
_SOON = 1e-3


class Clairvoyant(BasePolicy):
    """Ranks by seconds to restore, per slot, over seconds until the next use."""

    exact = False  # a request that found less than it could have had leaves later blocks' next use behind

    def __init__(self, future: Future) -> None:
        self._future = future
        self._served = bytearray(len(future.times))
        #: By prefix id or adapter, how many of its uses were served.
        self._places: dict[int | str, int] = {}
        self.now = 0.0

    def serve(self, rid: str) -> None:
        """The request is being served: what it needs is not to come any more."""
        number = self._future.numbers[rid]
        self._served[number] = 1
        self.now = max(self.now, self._future.times[number])

    def coming(self, what: int | str | None) -> float:
        """Nominal time of the next use of a prefix, by its id, or of an adapter; infinite if there is none."""
        uses = self._future.uses.get(what) if isinstance(what, int) else self._future.adapters.get(what or "")
        if uses is None or what is None:
            return math.inf
        at = self._places.get(what, 0)
        while at < len(uses) and self._served[uses[at]]:
            at += 1
        self._places[what] = at
        return self._future.times[uses[at]] if at < len(uses) else math.inf

    def priority(self, node: Node) -> float:
        """log2 of the density; far below all for what never comes back."""
        return self._value(node, clean=node.clean)

    def host_priority(self, node: Node) -> float:
        """The same, with what it costs to have no host copy either."""
        return self._value(node, clean=False)

    def _value(self, node: Node, *, clean: bool) -> float:
        costs = self.view.costs
        if node.kind == "adapter":
            coming = self.coming(node.key)
            seconds = costs.load_s(node.size) + (0.0 if clean else costs.disk_s(node.size))
        else:
            coming = self.coming(node.tokens[0])
            seconds = costs.load_s(node.size) if clean else costs.recompute_s(0, node.size)
        if coming == math.inf or not node.size:
            return _NEVER
        ahead = max(coming - self.now, _SOON)
        return math.log2(seconds / node.size / ahead)

    def on_use(self, node: Node) -> None:
        """Its next use is another one from now on."""
        self.view.reprioritize(node)
