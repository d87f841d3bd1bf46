"""How many distinct adapters a batch needs (``Low_lora``), and what follows for the adapters on the device.

Shared by the policies that know this term. Work per tick is bounded: adapters are looked at in slices.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

from elora_sglang.core.policies.base import PolicyView
from elora_sglang.core.tree.node import Node

#: Nodes or adapters looked at in one tick.
SLICE = 8

#: Adapters whose share of use is known; beyond, the one not used for longest is forgotten.
MOST_ADAPTERS = 8_192


class RoundRobin:
    """Nodes that take turns in being looked at again; adding, removing and one turn are O(1) each."""

    def __init__(self) -> None:
        self._nodes: OrderedDict[int, Node] = OrderedDict()

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self._nodes)

    def add(self, node: Node) -> None:
        """``node`` takes part from now on, as the last one."""
        self._nodes[node.id] = node

    def discard(self, node: Node) -> None:
        """``node`` takes part no more."""
        self._nodes.pop(node.id, None)

    def take(self, limit: int = SLICE) -> list[Node]:
        """The next nodes in turn, at most ``limit``, each at most once."""
        taken = []
        for _ in range(min(limit, len(self._nodes))):
            id, node = self._nodes.popitem(last=False)
            self._nodes[id] = node
            taken.append(node)
        return taken

    def clear(self) -> None:
        """Forget all."""
        self._nodes.clear()


class AdapterDemand:
    """Shares of use per adapter, faded with half-life ``half_life_s``, and Low_lora by the paper's Eq. 3.

    ``Low_lora = sum_i (1 - (1 - prob_i)^BS)``, with prob_i the share of adapter i in all uses (those of the base model
    count in the total only) and BS ``view.batch_size``, which counts waiting requests too, so that a batch starved of
    slots does not make the demand look small.
    """

    def __init__(self, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._uses: OrderedDict[str | None, tuple[float, float]] = OrderedDict()  # weight, last use
        self._total: tuple[float, float] = (0.0, 0.0)
        self._left: list[str | None] = []
        self._sum: float = 0.0
        self.low_lora: float = 0.0
        self.resident: RoundRobin = RoundRobin()

    def _faded(self, use: tuple[float, float], now: float) -> float:
        return use[0] * math.pow(2.0, -(now - use[1]) / self._half_life_s)

    def use(self, adapter: str | None, now: float) -> None:
        """Count one use of the adapter (``None``: the base model)."""
        self._uses[adapter] = (1.0 + self._faded(self._uses.get(adapter, (0.0, now)), now), now)
        self._uses.move_to_end(adapter)
        self._total = (1.0 + self._faded(self._total, now), now)
        if len(self._uses) > MOST_ADAPTERS:
            self._uses.popitem(last=False)

    def tick(self, view: PolicyView) -> None:
        """Go on adding up Eq. 3; :attr:`low_lora` changes when all adapters have been counted."""
        now = view.now
        total = max(self._faded(self._total, now), 1e-12)
        batch = max(view.batch_size, 1.0)
        if not self._left:
            self._left, self._sum = [key for key in self._uses if key is not None], 0.0
        # _faded, written out: this loop runs in every scheduler iteration.
        uses, left, half_life, pow = self._uses, self._left, self._half_life_s, math.pow
        for _ in range(min(SLICE, len(left))):
            use = uses.get(left.pop())
            if use is not None:
                share = use[0] * pow(2.0, -(now - use[1]) / half_life) / total
                self._sum += 1.0 - (1.0 - share if share < 1.0 else 0.0) ** batch
        if not self._left:
            self.low_lora = self._sum

    def rescore(self, view: PolicyView, score: Callable[[Node], bool]) -> None:
        """Score a slice of the adapters on the device again; those whose ``score`` says it fell change places."""
        for node in self.resident.take():
            if score(node):
                view.reprioritize(node)
