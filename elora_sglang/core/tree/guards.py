"""What waiting requests need: evicted after all others, but never held."""

from __future__ import annotations

from elora_sglang.core.tree.node import Node
from elora_sglang.core.tree.order import EvictionOrder
from elora_sglang.core.tree.structure import Structure


class Guards:
    """Guarded nodes by the rank of the waiting request that needs them; ``Node.guard`` is the lowest rank."""

    def __init__(self, structure: Structure, order: EvictionOrder) -> None:
        self._structure = structure
        self._order = order
        self._by_rank: dict[int, dict[int, Node]] = {}

    def guard(self, node: Node, rank: int) -> None:
        """Request ``rank`` needs ``node`` and all above it."""
        self._structure.require_present(node)
        if rank < 1:
            raise ValueError(f"a guard's rank must be at least 1, got {rank}")
        guarded = self._by_rank.setdefault(rank, {})
        while node is not self._structure.root:
            guarded[node.id] = node
            node.guard = min(node.guard, rank) if node.guard else rank
            node = node.parent  # type: ignore[assignment]  # only the root has none

    def evictable_size(self, rank: int) -> int:
        """Evictable device slots of what requests up to ``rank`` need. O(their nodes)."""
        needed = {
            id: node for other, nodes in self._by_rank.items() if other <= rank for id, node in nodes.items()
        }
        return sum(node.size for node in needed.values() if node.evictable)

    def release(self, rank: int) -> None:
        """Request ``rank`` needs nothing any more."""
        for node in self._by_rank.pop(rank, {}).values():
            if node.guard == rank and node.parent is not None:
                others = [other for other, nodes in self._by_rank.items() if node.id in nodes]
                node.guard = min(others, default=0)
                self._order.reprioritize(node)

    def split(self, upper: Node, lower: Node) -> None:
        """Whoever needs ``lower`` needs ``upper``, which took its first tokens."""
        if lower.guard:
            for guarded in self._by_rank.values():
                if lower.id in guarded:
                    guarded[upper.id] = upper

    def clear(self) -> None:
        """The tree was emptied."""
        self._by_rank = {}
