"""Chameleon's score (MICRO '25, arXiv 2411.17741): 0.45 frequency + 0.10 recency + 0.45 size, for all objects.

The weights are the published ones; the scales are ours: uses and size as shares of the largest seen, recency
``1 / (1 + age / 60 s)``. Published for adapters alone; here it ranks KV too.
"""

from __future__ import annotations

from elora_sglang.core.policies.base import BasePolicy
from elora_sglang.core.policies.support.adapter_demand import RoundRobin
from elora_sglang.core.tree.node import Node

FREQUENCY, RECENCY, SIZE = 0.45, 0.10, 0.45
RECENCY_S = 60.0


class Chameleon(BasePolicy):
    """Scores at a node's own events, and a slice of all nodes again at every tick (the scales move).

    Between two turns a score is out of date: an approximation of at most nodes / 32 ticks. ``policy_state``: the score.
    """

    exact = False

    def __init__(self) -> None:
        self.on_reset()

    def on_reset(self) -> None:
        """Starts over."""
        self._most_visits: int = 1
        self._largest: int = 1
        self._turns: RoundRobin = RoundRobin()

    def priority(self, node: Node) -> float:
        """The score as of the node's last event or turn."""
        if node.policy_state is None:
            self._score(node)
        return float(node.policy_state)

    def _score(self, node: Node) -> bool:
        before = node.policy_state
        self._most_visits = max(self._most_visits, 1 + node.visits)
        self._largest = max(self._largest, node.size)
        age = max(self.view.now - node.last_use, 0.0)
        node.policy_state = (
            FREQUENCY * (1 + node.visits) / self._most_visits
            + RECENCY / (1 + age / RECENCY_S)
            + SIZE * node.size / self._largest
        )
        return before is not None and node.policy_state < before

    def _again(self, node: Node) -> None:
        if self._score(node):
            self.view.reprioritize(node)

    def on_insert(self, node: Node) -> None:
        """Joins the turn."""
        super().on_insert(node)
        self._turns.add(node)
        self._again(node)

    def on_use(self, node: Node) -> None:
        """Scores again."""
        self._again(node)

    def on_split(self, upper: Node, lower: Node) -> None:
        """Two smaller nodes."""
        if lower.resident:
            self._turns.add(upper)
        self._score(upper)
        self._again(lower)

    def on_drop(self, node: Node) -> None:
        """Leaves the turn."""
        self._turns.discard(node)

    def on_tick(self) -> None:
        """A slice of all nodes."""
        for node in self._turns.take():
            self._again(node)


def create() -> Chameleon:
    """A fresh policy."""
    return Chameleon()
