"""Eviction candidates: a lazy heap ordered by the policy's priority, ties by node id."""

from __future__ import annotations

import heapq

from elora_sglang.core.node import Node
from elora_sglang.core.policy import Policy

# Below this many entries compaction is not worth its pass.
SMALL = 64


class Candidates:
    """Keeps at least one entry for every candidate; entries may be out of date.

    A node that is used again, locked or given a child leaves its entry where it is. Only :meth:`pop` looks
    whether an entry is still right, and drops it or pushes it back with today's priority. Priorities that
    only rise by use make this exact: an entry is never above its node's priority. Each push pays for one
    pop, so all operations are O(log n) amortised, and locking a hot path touches no heap at all.
    """

    __slots__ = ("_heap", "_policy")

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[tuple[float, int, Node]] = []

    def __len__(self) -> int:
        """Number of entries, outdated ones included."""
        return len(self._heap)

    def offer(self, node: Node) -> None:
        """Add a node that has just become a candidate; does nothing when it has an entry already."""
        if node.queued is None:
            priority = self._policy.priority(node)
            node.queued = priority
            heapq.heappush(self._heap, (priority, node.id, node))

    def lowered(self, node: Node) -> None:
        """The policy lowered the priority of ``node``: make its entry follow."""
        if node.queued is not None and self._policy.priority(node) < node.queued:
            node.queued = None
            self.offer(node)

    def pop(self) -> Node | None:
        """Remove and return the candidate of lowest priority, or ``None`` when there is none."""
        heap, policy = self._heap, self._policy
        while heap:
            queued, _, node = heap[0]
            if node.queued != queued:
                heapq.heappop(heap)
                continue
            if node.is_candidate:
                priority = policy.priority(node)
                if priority != queued:
                    node.queued = priority
                    heapq.heapreplace(heap, (priority, node.id, node))
                    continue
                heapq.heappop(heap)
                node.queued = None
                return node
            heapq.heappop(heap)
            node.queued = None
        return None

    def compact(self, nodes: int) -> None:
        """Drop outdated entries once they outnumber the tree's ``nodes``: the heap stays O(nodes)."""
        if len(self._heap) <= 2 * nodes + SMALL:
            return
        live = {
            node.id: node for queued, _, node in self._heap if node.queued == queued and node.is_candidate
        }
        for _, _, node in self._heap:
            node.queued = None
        self._heap = []
        for node in live.values():
            node.queued = self._policy.priority(node)
            self._heap.append((node.queued, node.id, node))
        heapq.heapify(self._heap)

    def clear(self) -> None:
        """Forget all entries."""
        for _, _, node in self._heap:
            node.queued = None
        self._heap = []

    def entries(self) -> list[tuple[float, int, Node]]:
        """A copy of all entries, outdated ones included, for checks."""
        return list(self._heap)
