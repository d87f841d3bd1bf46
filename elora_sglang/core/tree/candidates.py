"""Candidates for leaving a tier, or for being moved: a lazy heap ordered by a key, ties by node id."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Literal

from elora_sglang.core.tree.node import Node

# Below this many entries compaction is not worth its pass.
SMALL = 64

#: Attribute of a node that holds the key of its current entry in one heap.
Slot = Literal["queued", "host_queued", "load_queued", "save_queued"]


class Candidates:
    """Keeps at least one entry for every candidate; entries may be out of date.

    A node that is used again, locked or given a child leaves its entry where it is. Only :meth:`peek` looks
    whether an entry is still right, and drops it or pushes it back with today's key. Keys that only rise
    between two calls of :meth:`lowered` make this exact: an entry is never above its node's key. Each push
    pays for one pop, so all operations are O(log n) amortised, and locking a hot path touches no heap at all.

    Args:
        slot: the node attribute this heap keeps its entries' keys in; no other heap of the tree uses it.
        key: today's key of a node; the lowest is taken first.
        may: whether a node is a candidate now.
    """

    __slots__ = ("_get", "_heap", "_key", "_may", "_set")

    def __init__(self, slot: Slot, key: Callable[[Node], float], may: Callable[[Node], bool]) -> None:
        descriptor = Node.__dict__[slot]
        self._get: Callable[[Node], float | None] = descriptor.__get__
        self._set: Callable[[Node, float | None], None] = descriptor.__set__
        self._key = key
        self._may = may
        self._heap: list[tuple[float, int, Node]] = []

    def __len__(self) -> int:
        """Number of entries, outdated ones included."""
        return len(self._heap)

    def offer(self, node: Node) -> None:
        """Add a node if it is a candidate and has no entry yet."""
        if self._get(node) is None and self._may(node):
            self._push(node)

    def _push(self, node: Node) -> None:
        key = self._key(node)
        self._set(node, key)
        heapq.heappush(self._heap, (key, node.id, node))

    def lowered(self, node: Node) -> bool:
        """The key of ``node`` may have fallen: its entry follows. Whether there is an outdated entry more now."""
        queued = self._get(node)
        if queued is None or self._key(node) >= queued:
            return False
        self._push(node)
        return True

    def renew(self, node: Node) -> None:
        """:meth:`offer`, or :meth:`lowered` if it has an entry."""
        queued = self._get(node)
        if queued is None:
            if self._may(node):
                self._push(node)
        elif self._key(node) < queued:
            self._push(node)

    def peek(self) -> Node | None:
        """The candidate with the lowest key, or ``None`` when there is none; its ``queued`` is that key."""
        heap, get, may = self._heap, self._get, self._may
        while heap:
            queued, _, node = heap[0]
            if get(node) != queued:
                heapq.heappop(heap)
            elif may(node):
                key = self._key(node)
                if key == queued:
                    return node
                self._set(node, key)
                heapq.heapreplace(heap, (key, node.id, node))
            else:
                heapq.heappop(heap)
                self._set(node, None)
        return None

    def pop(self) -> Node | None:
        """Remove and return the candidate with the lowest key, or ``None`` when there is none."""
        node = self.peek()
        if node is not None:
            heapq.heappop(self._heap)
            self._set(node, None)
        return node

    def compact(self, nodes: int) -> None:
        """Drop outdated entries once they outnumber the tree's ``nodes``: the heap stays O(nodes)."""
        if len(self._heap) <= 2 * nodes + SMALL:
            return
        live = {node.id: node for queued, _, node in self._heap if self._get(node) == queued}
        for _, _, node in self._heap:
            self._set(node, None)
        self._heap = []
        for node in live.values():
            if self._may(node):
                key = self._key(node)
                self._set(node, key)
                self._heap.append((key, node.id, node))
        heapq.heapify(self._heap)

    def clear(self) -> None:
        """Forget all entries."""
        for _, _, node in self._heap:
            self._set(node, None)
        self._heap = []

    def entries(self) -> list[tuple[float, int, Node]]:
        """A copy of all entries, outdated ones included, for checks."""
        return list(self._heap)
