"""What eviction must not take: locks of whoever uses a node, and pins of adapters."""

from __future__ import annotations

from elora_sglang.core.errors import InvariantError
from elora_sglang.core.tree.doomed import DoomedBranches
from elora_sglang.core.tree.node import Node
from elora_sglang.core.tree.order import EvictionOrder
from elora_sglang.core.tree.residency import Residency
from elora_sglang.core.tree.structure import Structure


class Locks:
    """Counts locks on whole paths, and moves sizes between evictable and protected.

    Attributes:
        pinned_size: slots that pinned adapters take or may take at any time, resident or not.
    """

    def __init__(
        self, structure: Structure, residency: Residency, order: EvictionOrder, doomed: DoomedBranches
    ) -> None:
        self._structure = structure
        self._residency = residency
        self._order = order
        self._doomed = doomed
        self.pinned_size = 0

    def lock(self, node: Node) -> None:
        """One lock more on ``node`` and everything above it."""
        self._structure.require_present(node)
        root, moved = self._structure.root, 0
        while node is not root:
            if not node.locks and node.resident and not node.pinned:
                moved += node.size
            node.locks += 1
            node = node.parent  # type: ignore[assignment]  # only the root has none
        self._residency.protect(moved)

    def unlock(self, node: Node) -> None:
        """One lock less on ``node`` and everything above it; what nothing holds of a doomed branch goes."""
        self._structure.require_present(node)
        if node.locks < 1:
            raise InvariantError(f"{node!r} is not locked")
        root, moved, anchor = self._structure.root, 0, node
        while node is not root:
            node.locks -= 1
            if not node.locks:
                if node.resident and not node.pinned:
                    moved += node.size
                # offer() asks the same, and would be called for every node of every path.
                if (node.resident and node.queued is None) or (node.host and node.host_queued is None):
                    self._order.offer(node)
            node = node.parent  # type: ignore[assignment]  # only the root has none
        self._residency.protect(-moved)
        if anchor.adapter is not None and anchor.adapter.doomed:
            self._doomed.reap(anchor)
            self._order.compact()

    def set_pinned(self, adapter: Node, pinned: bool) -> None:
        """Pin or unpin; nothing changes where it is so already."""
        if pinned == adapter.pinned:
            return
        was_evictable = adapter.evictable
        adapter.pinned = pinned
        self.pinned_size += adapter.size if pinned else -adapter.size
        if was_evictable != adapter.evictable:
            self._residency.protect(adapter.size if was_evictable else -adapter.size)
        self._order.offer(adapter)

    def clear(self) -> None:
        """The tree was emptied."""
        self.pinned_size = 0
