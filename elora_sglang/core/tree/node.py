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
        size: slots the node takes on a tier that holds it, device or host alike.
        payload: what the runtime keeps for the node's device slots (a slot tensor); opaque. ``None`` while not
            resident, and between the start of a load and the moment the runtime named the slots.
        host_payload: the same for its host slots.
        children: the nodes below, by key.
        parent: ``None`` for the root and for nodes that have left the tree.
        adapter: the adapter above a KV node, an adapter itself, ``None`` for the root.
        locks: how many locks pin the node, its descendants' included.
        arrival: how many nodes had got device slots when it did, itself included; tells who came first.
        visits: counted uses (one a request); survives the eviction of an adapter.
        last_tick: tick of the tree's logical clock at its last match or insert.
        last_use: the tree's ``now`` (seconds) at its creation or last counted use.
        resident: whether it has device slots; its bytes are there, or on their way (``transfer``).
        host: whether it has host slots; its bytes are there, or on their way (``transfer``).
        transfer: the copy in flight that brings bytes to this node, from whatever side; ``None``: none.
        resident_children, host_children: how many children have device slots, host slots.
        pinned: an adapter that eviction never takes from the device.
        doomed: an adapter that was unloaded and waits for its last lock or copy.
        guard: rank of the earliest waiting request that needs it; 0: none does.
        policy_state: the policy's own state of this node.
        queued, host_queued: key of its current entry among the candidates of a tier; ``None`` without one.
        load_queued, save_queued: the same for the swapper's candidates.
    """

    __slots__ = (
        "adapter",
        "arrival",
        "children",
        "doomed",
        "guard",
        "host",
        "host_children",
        "host_payload",
        "host_queued",
        "id",
        "key",
        "kind",
        "last_tick",
        "last_use",
        "load_queued",
        "locks",
        "parent",
        "payload",
        "pinned",
        "policy_state",
        "queued",
        "resident",
        "resident_children",
        "save_queued",
        "size",
        "tokens",
        "transfer",
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
    ) -> None:
        self.id = id
        self.kind: Kind = kind
        self.key = key
        self.tokens = tokens
        self.size = size
        self.payload: Any = None
        self.host_payload: Any = None
        self.parent = parent
        self.adapter: Node | None = self if kind == "adapter" else adapter
        self.children: dict[Hashable, Node] = {}
        self.resident_children = 0
        self.host_children = 0
        self.arrival = 0
        self.locks = 0
        self.visits = 0
        self.last_tick = 0
        self.last_use = 0.0
        self.resident = False
        self.host = False
        self.transfer: int | None = None
        self.pinned = False
        self.doomed = False
        self.guard = 0
        self.policy_state: Any = None
        self.queued: float | None = None
        self.host_queued: float | None = None
        self.load_queued: float | None = None
        self.save_queued: float | None = None

    def inherit(self, lower: Node) -> None:
        """Take over the state of ``lower``, whose first tokens this new node takes. Not its slots and children."""
        self.locks, self.guard, self.transfer = lower.locks, lower.guard, lower.transfer
        self.resident, self.host, self.arrival = lower.resident, lower.host, lower.arrival
        self.visits, self.last_tick, self.last_use = lower.visits, lower.last_tick, lower.last_use

    def void(self) -> None:
        """Out of the tree, on no tier, held by nobody; what it was used for stays."""
        self.parent, self.children = None, {}
        self.payload = self.host_payload = self.transfer = None
        self.resident = self.host = False
        self.resident_children = self.host_children = self.locks = self.guard = 0

    @property
    def evictable(self) -> bool:
        """Whether its device slots count as evictable: resident, not locked, not pinned (children or not)."""
        return self.resident and not self.locks and not self.pinned

    @property
    def is_candidate(self) -> bool:
        """Whether eviction may take its device slots now: evictable, a device leaf, and holding slots at all."""
        return (
            self.resident
            and not self.locks
            and not self.pinned
            and not self.resident_children
            and self.size > 0
        )

    @property
    def is_host_candidate(self) -> bool:
        """Whether its host slots may go now: a host leaf that no lock and no copy in flight holds."""
        return (
            self.host
            and not self.locks
            and not self.host_children
            and self.transfer is None
            and self.size > 0
        )

    @property
    def clean(self) -> bool:
        """Whether its host copy is complete, so that the device slots can be given up without a copy."""
        return self.host and (self.transfer is None or self.size == 0)

    def __lt__(self, other: Node) -> bool:
        # Two heap entries of one node may carry the same priority; their order is of no consequence.
        return self.id < other.id

    def __repr__(self) -> str:
        name = f" {self.key!r}" if self.kind == "adapter" else ""
        flags = "".join(
            f" {flag}" for flag in ("resident", "host", "pinned", "doomed", "transfer") if getattr(self, flag)
        )
        return f"<{self.kind} {self.id}{name} size={self.size} locks={self.locks}{flags}>"


class Match(NamedTuple):
    """Longest prefix held in memory.

    Attributes:
        node: last node with device slots on the path (the adapter on a miss).
        length: tokens up to ``node``.
        host_node: last node of the path that the host has beyond that, complete; ``node`` if there is none.
        host_length: tokens between ``node`` and ``host_node``.
    """

    node: Node
    length: int
    host_node: Node
    host_length: int

    @classmethod
    def of_walk(cls, node: Node, length: int, adapter: Node) -> Match:
        """The match of a walk below ``adapter`` that ended in ``node``, after ``length`` tokens; changes nothing."""
        if node.resident:
            return cls(node, length, node, 0)
        path: list[Node] = []
        while node is not adapter:
            path.append(node)
            node = node.parent  # type: ignore[assignment]  # KV always has a parent
        device = host = adapter
        device_length = position = 0
        for one in reversed(path):
            if not one.resident and not one.clean:
                break  # its copy to the host is still under way
            position = min(position + one.size, length)
            host = one
            if one.resident:
                device, device_length = one, position
        return cls(device, device_length, host, position - device_length)


class Insert(NamedTuple):
    """Node that ends where the inserted key ends, and how many of its tokens had device slots before."""

    node: Node
    matched: int


Fate = Literal["demoted", "dropped", "saved"]


class Victim(NamedTuple):
    """A node that gave up its device slots; ``payload`` says which, and whoever receives it must free them.

    ``fate``: ``"demoted"`` (the host has a copy, or will have one), ``"dropped"`` (gone from memory), or
    ``"saved"``: the receiver starts the copy ``transfer`` to the host before the slots are written again.
    """

    node_id: int
    kind: Kind
    key: Any
    payload: Any
    size: int
    fate: Fate = "dropped"
    transfer: int | None = None


class HostVictim(NamedTuple):
    """A node that gave up its host slots; whoever receives it must free ``payload``. ``gone``: no copy is left."""

    node_id: int
    kind: Kind
    key: Any
    payload: Any
    size: int
    gone: bool


class DroppedBranch(NamedTuple):
    """What an unload freed at once on each tier, and how many device slots stay until the last lock goes."""

    victims: list[Victim]
    locked_size: int
    host_victims: list[HostVictim]


class Transfer:
    """A copy in flight: what it brings where.

    Attributes:
        id: unique in its tree, in order of creation.
        kind: ``"load"`` (host to device), ``"save"`` (device to host) or ``"read"`` (file to host).
        nodes: whose bytes it brings, parents first; a split adds to them.
        anchor: the node it keeps locked; ``None`` for a save of device slots that were given up already.
        size: slots.
        begun: :attr:`Node.arrival` of the last node that had device slots when it began. Children with a later one
            build on what it brings.
    """

    __slots__ = ("anchor", "begun", "id", "kind", "nodes", "size")

    def __init__(
        self,
        id: int,
        kind: Literal["load", "save", "read"],
        nodes: list[Node],
        anchor: Node | None,
        begun: int,
    ) -> None:
        self.id = id
        self.kind = kind
        self.nodes = nodes
        self.anchor = anchor
        self.size = sum(node.size for node in nodes)
        self.begun = begun
