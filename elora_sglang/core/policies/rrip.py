"""Re-reference interval prediction: what is new is expected late, what was used again soon."""

from __future__ import annotations

from elora_sglang.core.policies.base import BasePolicy
from elora_sglang.core.tree.node import Node

#: Intervals by which something new, and something just used, is ahead of what leaves next.
NEW, USED = 1.0, 3.0


class Rrip(BasePolicy):
    """SRRIP with two bits (Jaleel et al., ISCA '10), hit priority.

    A re-reference value of 3 leaves, new nodes have 2, a use sets 0, and if nobody has 3 all values rise until one
    has. Instead of raising all, an age counts how often they would have been raised, and a node keeps the age at which
    it will have 3: ``policy_state``.
    """

    def __init__(self) -> None:
        self._age = 0.0

    def priority(self, node: Node) -> float:
        """The age at which the node is due."""
        return self._age + NEW if node.policy_state is None else float(node.policy_state)

    def on_insert(self, node: Node) -> None:
        """New, or back."""
        super().on_insert(node)
        node.policy_state = self._age + NEW
        self.view.reprioritize(node)

    def on_use(self, node: Node) -> None:
        """As far from leaving as can be."""
        node.policy_state = self._age + USED

    def on_split(self, upper: Node, lower: Node) -> None:
        """Both halves are due when the node was."""
        upper.policy_state = lower.policy_state

    def on_evict(self, node: Node) -> None:
        """All others are older by what this one had left."""
        if not node.doomed:
            self._age = max(self._age, self.priority(node))

    def on_reset(self) -> None:
        """Age starts over."""
        self._age = 0.0


def create() -> Rrip:
    """A fresh RRIP policy."""
    return Rrip()
