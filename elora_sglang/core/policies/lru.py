"""Least recently used first. A match or an insert touches every node of its path."""

from __future__ import annotations

from elora_sglang.core.policies.base import BasePolicy
from elora_sglang.core.tree.node import Node


class Lru(BasePolicy):
    """Ranks by the tick of the last touch, KV and adapters alike; keeps no state of its own."""

    def priority(self, node: Node) -> float:
        """The node's last tick."""
        return node.last_tick


def create() -> Lru:
    """A fresh LRU policy."""
    return Lru()
