"""The way in: walks that count as a use, what they split, and what inserts add."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from typing import Any

from elora_sglang.core.errors import InvariantError
from elora_sglang.core.tree.guards import Guards
from elora_sglang.core.tree.node import Insert, Match, Node
from elora_sglang.core.tree.payloads import PayloadOps
from elora_sglang.core.tree.ranking import Ranking
from elora_sglang.core.tree.residency import Residency
from elora_sglang.core.tree.structure import Structure
from elora_sglang.core.tree.transfers import Transfers


class Access:
    """Matches and inserts. Owns the tree's clocks, and what nodes remember of their uses.

    Attributes:
        tick: counts operations; the time of recency.
        now: seconds, as the tree's owner sets it.
    """

    def __init__(
        self,
        structure: Structure,
        residency: Residency,
        guards: Guards,
        transfers: Transfers,
        ranking: Ranking,
        payloads: PayloadOps,
    ) -> None:
        self._structure = structure
        self._residency = residency
        self._guards = guards
        self._transfers = transfers
        self._ranking = ranking
        self._payloads = payloads
        self.tick = 0
        self.now = 0.0

    def match(
        self, adapter: Node, tokens: array[int], namespace: Hashable = None, limit: int | None = None
    ) -> Match:
        """Walk, touch the path, split where the walk ends, tell the policy."""
        structure = self._structure
        structure.require_adapter(adapter)
        n = structure.whole_pages(tokens, limit)
        self.tick += 1
        node, length = self._use(adapter, tokens, n, namespace)
        self._ranking.on_access(node)
        return Match.of_walk(node, length, adapter)

    def _use(self, adapter: Node, tokens: array[int], n: int, namespace: Hashable) -> tuple[Node, int]:
        """Walk, touch, and split where the walk ends inside a node: (last node, tokens up to its end)."""
        node, length, inside = self._structure.descend(adapter, tokens, n, namespace, self.tick)
        if inside:
            node = self._split(node, inside)
            node.last_tick = self.tick
        return node, length

    def find(self, adapter: Node, tokens: array[int], namespace: Hashable = None) -> tuple[Node, int]:
        """Walk, and change nothing."""
        structure = self._structure
        structure.require_adapter(adapter)
        return structure.descend(adapter, tokens, structure.whole_pages(tokens, None), namespace)[:2]

    def still_ends(self, node: Node, length: int, tokens: array[int]) -> bool:
        """Whether a walk that ended with ``node``, after ``length`` tokens, still does. O(1)."""
        if node.parent is None:
            return False
        n = len(tokens)
        if length >= n - n % self._structure.page_size:
            return True
        return self._structure.key(tokens, length, None) not in node.children

    def touch(self, node: Node) -> None:
        """Touch a path that is known to end at ``node``, and tell the policy."""
        self.tick = tick = self.tick + 1
        one, root = node, self._structure.root
        while one is not root:
            one.last_tick = tick
            one = one.parent  # type: ignore[assignment]  # only the root has none
        self._ranking.on_access(node)

    def insert(
        self, adapter: Node, tokens: array[int], namespace: Hashable, payload: Any, length: int | None = None
    ) -> Insert:
        """Walk, touch, split; then what is missing takes slots of ``payload``."""
        structure = self._structure
        structure.require_adapter(adapter)
        if not adapter.resident:
            raise InvariantError(f"KV cannot be inserted below {adapter!r}: it is not resident")
        n = structure.whole_pages(tokens, length)
        self.tick += 1
        node, present = self._use(adapter, tokens, n, namespace)
        matched = present if node.resident else self._return_to_device(node, present, payload)
        if present < n:
            tail = self._payloads.slice(payload, present, n)
            node = structure.add_kv(node, structure.key(tokens, present, namespace), tokens[present:n])
            node.last_tick, node.last_use = self.tick, self.now
            self._residency.enter_device(node, tail)
        self._ranking.on_access(node)
        return Insert(node, matched)

    def _return_to_device(self, node: Node, end: int, payload: Any) -> int:
        """What only the host has, on the way to ``node``, takes slots of ``payload``; tokens before that.

        ``end``: tokens up to the end of ``node``.
        """
        returning = self._transfers.missing(node)
        first = start = end - sum(one.size for one in returning)
        for one in returning:
            self._residency.enter_device(one, self._payloads.slice(payload, start, start + one.size))
            start += one.size
        return first

    def split_at(self, adapter: Node, tokens: array[int], namespace: Hashable, at: int) -> Node:
        """Walk, and split after ``tokens[:at]``."""
        structure = self._structure
        structure.require_adapter(adapter)
        node, length, inside = structure.descend(
            adapter, tokens, structure.whole_pages(tokens, at), namespace
        )
        if length != at:
            raise InvariantError(
                f"cannot split below {adapter!r}: its first {at} tokens are not all in memory"
            )
        return self._split(node, inside) if inside else node

    def bring_adapter(self, node: Node, payload: Any) -> None:
        """The adapter's weights lie in the slots of ``payload``."""
        self._structure.require_adapter(node)
        if node.resident:
            raise InvariantError(f"{node!r} is resident already")
        self.tick += 1
        node.last_tick, node.last_use = self.tick, self.now
        self._residency.enter_device(node, payload)

    def count_use(self, node: Node) -> None:
        """One use more of ``node`` and all above it, the adapter first."""
        self._structure.require_present(node)
        assert node.adapter is not None  # only the root, which is refused, has none
        for one in (node.adapter, *self._structure.path(node)):
            one.visits += 1
            one.last_use = self.now
            self._ranking.on_use(one)

    def _split(self, lower: Node, at: int) -> Node:
        """Cut KV ``lower`` after its first ``at`` tokens; a new node, which is returned, takes them."""
        upper = self._structure.split(lower, at)
        self._residency.split(upper, lower, at)
        self._transfers.split(upper, lower)
        self._guards.split(upper, lower)
        self._ranking.on_split(upper, lower)
        return upper
