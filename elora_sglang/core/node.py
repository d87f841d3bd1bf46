"""Nodes of the dependency tree, and what the tree's calls return."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from typing import Any, Literal, NamedTuple

Kind = Literal["root", "adapter", "kv"]


class Node:
    """One node: the root, an adapter, or the KV of a run of tokens below an adapter.

    Written by the tree only; everybody else reads. Policies find here what they score by.

    Attributes:
        id: unique in its tree, in order of creation, never reused. Breaks all ties.
        kind: ``"root"``, ``"adapter"`` or ``"kv"``.
        key: the key in ``parent.children``. Adapter: its name in the tree (``None``: base model). KV: its
            first page, paired with the namespace directly below an adapter.
        tokens: the node's tokens (KV), whole pages; empty otherwise.
        size: pool slots the node takes while resident.
        payload: what the runtime keeps for the node (a slot tensor); opaque. ``None`` while not resident.
        children: the nodes below, by key.
        parent: ``None`` for the root and for nodes that have left the tree.
        adapter: the adapter above a KV node, an adapter itself, ``None`` for the root.
        locks: how many locks pin the node, its descendants' included.
        visits: how many matches used it; survives the eviction of an adapter.
        last_tick: tick of the tree's logical clock at its last use.
        resident: whether its slots hold its bytes. Always true for KV.
        pinned: an adapter that eviction never takes.
        doomed: an adapter that was unloaded and waits for its last lock.
        queued: priority of its current entry among the eviction candidates; ``None`` without one.
    """

    __slots__ = (
        "adapter",
        "children",
        "doomed",
        "id",
        "key",
        "kind",
        "last_tick",
        "locks",
        "parent",
        "payload",
        "pinned",
        "queued",
        "resident",
        "size",
        "tokens",
        "visits",
    )

    def __init__(
        self,
        id: int,
        kind: Kind,
        key: Any,
        *,
        tokens: array[int],
        size: int,
        parent: Node | None,
        adapter: Node | None,
        payload: Any = None,
        resident: bool = False,
        pinned: bool = False,
    ) -> None:
        self.id = id
        self.kind: Kind = kind
        self.key = key
        self.tokens = tokens
        self.size = size
        self.payload = payload
        self.parent = parent
        self.adapter: Node | None = self if kind == "adapter" else adapter
        self.children: dict[Hashable, Node] = {}
        self.locks = 0
        self.visits = 0
        self.last_tick = 0
        self.resident = resident
        self.pinned = pinned
        self.doomed = False
        self.queued: float | None = None

    @property
    def evictable(self) -> bool:
        """Whether its slots count as evictable: resident, not locked, not pinned (children or not)."""
        return self.resident and not self.locks and not self.pinned

    @property
    def is_candidate(self) -> bool:
        """Whether eviction may take it now: evictable, no children, and holding slots at all."""
        return self.resident and not self.locks and not self.pinned and not self.children and self.size > 0

    def __lt__(self, other: Node) -> bool:
        # Two heap entries of one node may carry the same priority; their order is of no consequence.
        return self.id < other.id

    def __repr__(self) -> str:
        name = f" {self.key!r}" if self.kind == "adapter" else ""
        flags = "".join(f" {flag}" for flag in ("resident", "pinned", "doomed") if getattr(self, flag))
        return f"<{self.kind} {self.id}{name} size={self.size} locks={self.locks}{flags}>"


class Match(NamedTuple):
    """Longest resident prefix: its last node (the adapter on a miss) and its length in tokens."""

    node: Node
    length: int


class Insert(NamedTuple):
    """Node that ends where the inserted key ends, and how many of its tokens were there before."""

    node: Node
    matched: int


class Victim(NamedTuple):
    """A node that gave up its slots; ``payload`` says which, and whoever receives it must free them."""

    node_id: int
    kind: Kind
    key: Any
    payload: Any
    size: int


class DroppedBranch(NamedTuple):
    """What an unload freed at once, and how many slots stay until the last lock goes."""

    victims: list[Victim]
    locked_size: int
