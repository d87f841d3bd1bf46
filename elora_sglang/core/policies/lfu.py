"""Least frequently used first, the least recently touched of equals."""

from __future__ import annotations

from elora_sglang.core.policies.base import BasePolicy
from elora_sglang.core.tree.node import Node

_MOST, _TICKS = 4096, 2.0**40


class Lfu(BasePolicy):
    """Ranks by counted uses (up to 4,096), then by the tick of the last touch."""

    def priority(self, node: Node) -> float:
        """Visits, with the tick as fraction."""
        return min(node.visits, _MOST) * _TICKS + node.last_tick


def create() -> Lfu:
    """A fresh LFU policy."""
    return Lfu()
