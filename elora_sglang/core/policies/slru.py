"""Segmented LRU: what was used again is protected from what was used once."""

from __future__ import annotations

from collections import OrderedDict

from elora_sglang.core.policies.base import BasePolicy
from elora_sglang.core.tree.node import Node

#: Share of the device that the protected segment may fill.
PROTECTED_SHARE = 0.8

_PROTECTED = 2.0**45


class Slru(BasePolicy):
    """A counted use protects a node; the least recently used protected ones return to probation as its newest.

    ``policy_state``: ``None`` or the tick at which the node returned to probation.
    """

    def __init__(self) -> None:
        self._protected: OrderedDict[int, Node] = OrderedDict()
        self._size = 0
        self._tick = 0

    def priority(self, node: Node) -> float:
        """The tick of the last touch, above all of probation when protected."""
        if node.id in self._protected:
            return _PROTECTED + node.last_tick
        return max(node.last_tick, node.policy_state or 0)

    def on_access(self, node: Node) -> None:
        """Keeps the tick."""
        self._tick = max(self._tick, node.last_tick)

    def on_use(self, node: Node) -> None:
        """Protects the node."""
        if not node.resident or not node.size:
            return
        if node.id in self._protected:
            self._protected.move_to_end(node.id)
            return
        self._protected[node.id] = node
        self._size += node.size
        limit = PROTECTED_SHARE * self.view.device_slots if self.view.device_slots else float("inf")
        while self._size > limit:
            _, oldest = self._protected.popitem(last=False)
            self._size -= oldest.size
            oldest.policy_state = self._tick
            self.view.reprioritize(oldest)

    def on_split(self, upper: Node, lower: Node) -> None:
        """Both halves stay where the node was."""
        upper.policy_state = lower.policy_state
        if lower.id in self._protected:
            self._protected[upper.id] = upper

    def on_evict(self, node: Node) -> None:
        """Leaves its segment."""
        if self._protected.pop(node.id, None) is not None:
            self._size -= node.size
        node.policy_state = None
        self.view.reprioritize(node)  # its host copy, if any

    def on_reset(self) -> None:
        """Both segments are empty."""
        self._protected.clear()
        self._size = 0


def create() -> Slru:
    """A fresh SLRU policy."""
    return Slru()
