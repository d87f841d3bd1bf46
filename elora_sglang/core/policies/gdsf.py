"""GreedyDual-Size-Frequency (Cherkasova 1998): ``H = L + uses * cost / size``, L the H of the last victim."""

from __future__ import annotations

from elora_sglang.core.policies.base import BasePolicy
from elora_sglang.core.tree.node import Node


class Gdsf(BasePolicy):
    """Ages by inflation: L rises to every victim's H, and a node takes the L of its last use.

    Cost is the cheapest way back in seconds (load, recompute, or file), as of the last use; size in bytes. The unit
    of H is one nanosecond per KiB. ``policy_state``: H.
    """

    def __init__(self) -> None:
        self._inflation = 0.0

    def priority(self, node: Node) -> float:
        """H as of the last use."""
        if node.policy_state is None:
            self._value(node)
        return float(node.policy_state)

    def _value(self, node: Node) -> None:
        costs, size = self.view.costs, max(node.size, 1)
        if node.clean:
            seconds = costs.load_s(size)
        elif node.kind == "adapter":
            seconds = costs.disk_s(size) + costs.load_s(size)
        else:
            seconds = costs.recompute_s(0, size)
        fresh = self._inflation + (1 + node.visits) * seconds * 1e9 * 1024 / (size * costs.slot_bytes)
        node.policy_state = fresh if node.policy_state is None else max(node.policy_state, fresh)

    def on_insert(self, node: Node) -> None:
        """Starts at today's inflation."""
        super().on_insert(node)
        self._value(node)

    def on_use(self, node: Node) -> None:
        """Rises."""
        self._value(node)

    def on_split(self, upper: Node, lower: Node) -> None:
        """Both halves keep H."""
        upper.policy_state = lower.policy_state

    def on_evict(self, node: Node) -> None:
        """Inflation rises to the victim's H."""
        if node.policy_state is not None and not node.doomed:
            self._inflation = max(self._inflation, node.policy_state)

    def on_reset(self) -> None:
        """Inflation starts over."""
        self._inflation = 0.0


def create() -> Gdsf:
    """A fresh GDSF policy."""
    return Gdsf()
