"""The dependency tree: root → adapter → KV, on two tiers of slots. Here is its interface.

KV hangs below the adapter it was computed under, so locking a KV node pins its adapter, and eviction,
which takes only leaves of a tier, can never leave KV without its adapter or its prefix. The tree owns structure
and sizes; slots and bytes belong to the runtime, which the tree reaches through :class:`PayloadOps` only. Time
is a counter of operations, and :attr:`DependencyTree.now` as its owner sets it.

Which part does what: :mod:`elora_sglang.core.tree`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

from elora_sglang.core.errors import InvariantError
from elora_sglang.core.tree.checks import check_parts
from elora_sglang.core.tree.eviction import never
from elora_sglang.core.tree.node import DroppedBranch, HostVictim, Insert, Kind, Match, Node, Transfer, Victim
from elora_sglang.core.tree.parts import Parts
from elora_sglang.core.tree.payloads import PayloadOps
from elora_sglang.core.tree.ranking import Ranking
from elora_sglang.core.tree.transfers import Ended

__all__ = [
    "DependencyTree",
    "DroppedBranch",
    "Ended",
    "HostVictim",
    "Insert",
    "InvariantError",
    "Match",
    "Node",
    "PayloadOps",
    "Transfer",
    "Victim",
]


class DependencyTree:
    """Adapters and KV of one pool. Single-threaded; the same calls give the same results everywhere.

    Args:
        page_size: tokens per page; keys, matches and splits are whole pages.
        policy: ranks what eviction takes, and is told of every event.
        payloads: splits and slices payloads.

    Attributes:
        root, base: ``base`` is the base model's adapter node: key ``None``, size 0, always on both tiers, never
            evicted.
        parts: what the tree is made of, for checks and tests; nobody else calls them.

    Raises:
        ValueError: ``page_size`` below 1.
    """

    def __init__(self, page_size: int, policy: Ranking, payloads: PayloadOps) -> None:
        self.page_size = page_size
        self.policy = policy
        self.parts = parts = Parts.build(page_size, policy, payloads)
        self._structure, self._residency, self._order = parts.structure, parts.residency, parts.order
        self._locks, self._guards, self._doomed = parts.locks, parts.guards, parts.doomed
        self._transfers, self._eviction, self._access = parts.transfers, parts.eviction, parts.access
        self.root, self.base = parts.structure.root, parts.structure.base

    # -- clocks -----------------------------------------------------------------------------------

    @property
    def tick(self) -> int:
        """Counts operations; the time of recency."""
        return self._access.tick

    @property
    def now(self) -> float:
        """Seconds; set by whoever drives the tree, read by policies."""
        return self._access.now

    @now.setter
    def now(self, seconds: float) -> None:
        self._access.now = seconds

    # -- sizes, in slots --------------------------------------------------------------------------

    @property
    def evictable_size(self) -> int:
        """Device slots that no lock or pin holds, and those of victims not collected yet."""
        return self._residency.evictable_size + self._doomed.size

    @property
    def protected_size(self) -> int:
        """Device slots of nodes that are locked or pinned."""
        return self._residency.protected_size

    @property
    def host_size(self) -> int:
        """Host slots in use."""
        return self._residency.host_size

    @property
    def adapter_size(self) -> int:
        """Device slots in use by adapters."""
        return self._residency.adapter_size

    @property
    def invalid_kv_size(self) -> int:
        """Device slots of KV whose adapter has none: 0 unless the policy gave up the dependency."""
        return self._residency.invalid_kv_size

    # -- reading ----------------------------------------------------------------------------------

    def adapter(self, key: str | None) -> Node | None:
        """The adapter registered under ``key`` (``None``: the base model), if any. Never a doomed one."""
        return self.root.children.get(key)

    def adapters(self) -> list[Node]:
        """All registered adapters in order of registration, the base model first; no doomed ones."""
        return list(self.root.children.values())

    def adapter_of(self, node: Node) -> Node:
        """The adapter above ``node`` (itself for an adapter)."""
        if node.adapter is None:
            raise InvariantError("the root has no adapter")
        return node.adapter

    def is_doomed(self, node: Node) -> bool:
        """Whether the branch of ``node`` was unloaded; nothing can be matched or inserted there any more."""
        return node.adapter is not None and node.adapter.doomed

    def path(self, node: Node) -> list[Node]:
        """KV nodes from the adapter (exclusive) down to ``node`` (inclusive)."""
        return self._structure.path(node)

    def walk(self, start: Node | None = None) -> Iterator[Node]:
        """``start`` and all below it, parents first; by default the whole tree, doomed branches included.

        The tree must not change meanwhile.
        """
        return self._structure.walk(start)

    def kv_nodes(self) -> Iterator[Node]:
        """All KV nodes, those of doomed branches included; the tree must not change meanwhile."""
        return (node for node in self.walk() if node.kind == "kv")

    @property
    def nodes(self) -> int:
        """Number of nodes: KV and adapters, resident or not, doomed ones included; without the root."""
        return self._structure.nodes

    @property
    def transfers(self) -> dict[int, Transfer]:
        """Copies in flight by id, in order of their start."""
        return self._transfers.by_id

    def counts(self) -> dict[str, int]:
        """Number of nodes by kind and state. O(adapters)."""
        adapters = self.adapters()
        return {
            "kv": self._structure.kv_count,
            "adapters": len(adapters) - 1,
            "adapters_resident": sum(node.resident for node in adapters) - 1,
            "adapters_on_host": sum(node.host for node in adapters) - 1,
            "adapters_pinned": sum(node.pinned for node in adapters),
            "adapters_doomed": len(self._structure.doomed),
        }

    def render(self, tokens: int = 8) -> str:
        """The tree as indented lines, with the first ``tokens`` tokens of every KV node."""
        return self._structure.render(tokens)

    # -- adapters -------------------------------------------------------------------------------

    def register_adapter(self, key: str, size: int, *, pinned: bool = False) -> Node:
        """The node of adapter ``key``, which takes ``size`` slots; new ones are not resident yet.

        Registering the same key and size again returns the same node with ``pinned`` as given now.
        After :meth:`drop_branch` the key is free, even while the old branch waits for its last lock.
        """
        node = self.adapter(key)
        if node is None:
            if size < 0 or key is None:
                raise InvariantError(f"adapter {key!r} cannot be registered with {size} slots")
            node = self._structure.add_adapter(key, size)
        elif node.size != size:
            raise InvariantError(
                f"adapter {key!r} is registered with {node.size} slots, not {size}; drop it first"
            )
        self.set_pinned(node, pinned)
        return node

    def set_pinned(self, node: Node, pinned: bool) -> None:
        """Pin or unpin an adapter; a pinned one is never evicted and counts as protected while resident."""
        self._structure.require_adapter(node)
        if node is not self.base:
            self._locks.set_pinned(node, pinned)

    def make_resident(self, node: Node, payload: Any) -> None:
        """The adapter's weights now lie in the slots of ``payload``; its size counts from here on."""
        self._access.bring_adapter(node, payload)

    def place_on_host(self, adapter: Node, payload: Any) -> None:
        """An adapter was written into host slots before the tree was told: it is complete there from now on."""
        self._structure.require_adapter(adapter)
        if adapter.host:
            raise InvariantError(f"{adapter!r} has host slots")
        self._residency.enter_host(adapter, payload)

    # -- match and insert -------------------------------------------------------------------------

    def match(
        self, adapter: Node, tokens: array[int], namespace: Hashable = None, limit: int | None = None
    ) -> Match:
        """Longest prefix of ``tokens[:limit]`` below ``adapter`` that either tier has, in whole pages.

        Uses the path (tick, policy) but counts no use, and splits the last node when the match ends inside it,
        so that a node ends where the match ends. A miss returns the adapter with length 0, never the root.
        """
        return self._access.match(adapter, tokens, namespace, limit)

    def find(self, adapter: Node, tokens: array[int], namespace: Hashable = None) -> tuple[Node, int]:
        """The last node that shares tokens with ``tokens``, on whatever tier, and how many do; changes nothing."""
        return self._access.find(adapter, tokens, namespace)

    def still_ends(self, node: Node, length: int, tokens: array[int]) -> bool:
        """Whether a walk along ``tokens`` that ended with KV ``node``, after ``length`` tokens, still does. O(1).

        A node's path says the same tokens for as long as it is in the tree, however it is split: a split node
        keeps its end. So only what hangs below it can have changed the answer.
        """
        return self._access.still_ends(node, length, tokens)

    def touch(self, node: Node) -> None:
        """What :meth:`match` does to a path, where it is known to end at ``node`` (see :meth:`still_ends`)."""
        self._access.touch(node)

    def insert(
        self, adapter: Node, tokens: array[int], namespace: Hashable, payload: Any, length: int | None = None
    ) -> Insert:
        """Put the KV of ``tokens[:length]`` below ``adapter``; ``payload`` covers at least these tokens.

        The tree keeps the payload of the whole pages that had no device slots; slots ``[0, matched)`` and any
        part page stay the caller's. Nodes that only the host had become resident again in the caller's slots.
        Uses the path, but counts no use.

        Raises:
            InvariantError: the adapter is not resident, or was unloaded.
        """
        return self._access.insert(adapter, tokens, namespace, payload, length)

    def split_at(self, adapter: Node, tokens: array[int], namespace: Hashable, at: int) -> Node:
        """Make a node end after ``tokens[:at]``, which must be in memory; a structural change only.

        Eviction can then take what comes behind without what comes before. Returns that node.
        """
        return self._access.split_at(adapter, tokens, namespace, at)

    def count_use(self, node: Node) -> None:
        """Count one use of ``node`` and all above it, the adapter first: visits, time, policy."""
        self._access.count_use(node)

    # -- locks, guards, priorities ----------------------------------------------------------------

    def lock(self, node: Node) -> None:
        """Pin ``node`` and everything above it, its adapter included; sizes move to protected.

        Raises:
            InvariantError: ``node`` has left the tree, or is the root, whose lock would pin no adapter.
        """
        self._locks.lock(node)

    def unlock(self, node: Node) -> None:
        """Take back one :meth:`lock` of ``node``.

        What a doomed branch frees by it is handed out by ``collect_doomed`` (or the next eviction), and its
        device slots count as evictable until then.
        """
        self._locks.unlock(node)

    def guard(self, node: Node, rank: int) -> None:
        """Waiting request ``rank`` (1, 2, ... in order of arrival) needs ``node`` and all above it.

        Guarded nodes are evicted after all others, those that only late requests need first. They still
        count as evictable: a guard never makes memory unavailable.
        """
        self._guards.guard(node, rank)

    def guarded_size(self, rank: int) -> int:
        """Evictable device slots of what waiting requests up to ``rank`` need. O(their nodes)."""
        return self._guards.evictable_size(rank)

    def unguard(self, rank: int) -> None:
        """Release all guards of the request; does nothing when it has none."""
        self._guards.release(rank)

    def reprioritize(self, node: Node) -> None:
        """A policy calls this when a priority of ``node`` fell without a use of the node."""
        self._order.reprioritize(node)

    # -- eviction ---------------------------------------------------------------------------------

    def evict(self, need: int, kind: Kind = "kv", save: Callable[[Node], bool] = never) -> list[Victim]:
        """Free at least ``need`` device slots, or all that can be freed; the caller frees the victims' slots.

        Takes KV leaves and adapters without resident KV, never what is locked or pinned, in the policy's
        order; O(log n) amortised a victim. A victim with a host copy stays in the tree (``demoted``). A dirty
        KV victim leaves it (``dropped``) unless ``save(node)`` says to copy it to the host; only asked when
        its parent is complete there, and the caller has made sure that the host has room. An evicted adapter
        stays registered.

        Args:
            kind: what the room is for; a policy that keeps adapters and KV apart asks.
        """
        return self._eviction.from_device(need, kind, save)

    def peek_victim(self, kind: Kind = "kv") -> Node | None:
        """The node that :meth:`evict` would take first, if any; changes nothing but outdated entries."""
        return self._eviction.next_victim(kind)

    def evict_host(self, need: int) -> list[HostVictim]:
        """Free at least ``need`` host slots, or all that can be freed; the caller frees the victims' slots.

        Takes host leaves that no lock and no copy in flight holds, in the policy's order. A victim that has
        device slots becomes dirty, another one is gone: KV leaves the tree, an adapter has only its file.
        """
        return self._eviction.from_host(need)

    def peek_host_victim(self) -> Node | None:
        """The node that :meth:`evict_host` would take first, if any."""
        return self._order.host.peek()

    # -- copies -----------------------------------------------------------------------------------

    def missing(self, node: Node) -> list[Node]:
        """The nodes on the way from the adapter to ``node`` that have no device slots, adapter first."""
        return self._transfers.missing(node)

    def begin_load(self, node: Node) -> Transfer:
        """Host to device: everything :meth:`missing` on the way to ``node`` becomes resident at once.

        The nodes are locked until :meth:`end_transfer`. The caller allocates slots for each and names them
        with :meth:`set_payload`, or ends the transfer as failed.

        Raises:
            InvariantError: nothing is missing, or a missing node has no complete host copy.
        """
        return self._transfers.begin_load(node)

    def begin_save(self, node: Node) -> Transfer:
        """Device to host: everything on the way to ``node`` without host slots gets some; parents first.

        The nodes are locked until :meth:`end_transfer`. The caller allocates host slots for each and names
        them with :meth:`set_host_payload`, or ends the transfer as failed.

        Raises:
            InvariantError: the adapter or another node on the way is not complete on the host, a node is
                still being loaded, or all are there already.
        """
        return self._transfers.begin_save(node)

    def begin_read(self, adapter: Node) -> Transfer:
        """File to host: the adapter gets host slots, named with :meth:`set_host_payload`; locked till the end.

        Raises:
            InvariantError: not an adapter, or it has host slots.
        """
        return self._transfers.begin_read(adapter)

    def set_payload(self, node: Node, payload: Any) -> None:
        """Name the device slots of a node that is being loaded."""
        self._residency.name_device_slots(node, payload)

    def set_host_payload(self, node: Node, payload: Any) -> None:
        """Name the host slots of a node that is being saved or read."""
        self._residency.name_host_slots(node, payload)

    def end_transfer(self, id: int, ok: bool = True) -> Ended:
        """The copy is complete (``ok``), or failed: then its nodes lose what they had gained.

        Of a failed load the nodes leave the device again; of a failed save or read, the host. What was in
        memory nowhere else leaves the tree. The caller frees the victims' slots (a payload is ``None`` if it
        was never named).

        Raises:
            KeyError: no such transfer.
            InvariantError: a failed load whose nodes others have locked, or have begun to build on, in the
                meantime: bytes that nobody can vouch for are in use, and the server must stop.
        """
        return self._transfers.end(id, ok)

    # -- unload and reset -------------------------------------------------------------------------

    def drop_branch(self, adapter: Node) -> DroppedBranch:
        """Unload: everything unlocked leaves at once, what is locked when its last lock goes.

        The key is free from now on; the old branch is out of reach of :meth:`adapter`, and a match or an
        insert there raises. Dropping a branch that was dropped before frees nothing.

        Raises:
            InvariantError: ``adapter`` is no adapter, or the base model.
        """
        if adapter.kind != "adapter" or adapter is self.base:
            raise InvariantError(f"{adapter!r} cannot be unloaded")
        victims: list[Victim] = []
        host_victims: list[HostVictim] = []
        if adapter.parent is not None and not adapter.doomed:
            self._locks.set_pinned(adapter, False)
            victims, host_victims = self._doomed.doom(adapter)
        left = sum(node.size for node in self.walk(adapter) if node.resident)
        return DroppedBranch(victims, left, host_victims)

    def has_doomed(self, key: str) -> bool:
        """Whether an unloaded version of ``key`` still holds slots that were not handed out."""
        waiting = any(victim.key == key and victim.kind == "adapter" for victim in self._doomed.victims)
        return waiting or any(node.key == key for node in self._structure.doomed.values())

    def collect_doomed(self) -> list[Victim]:
        """What doomed branches gave up on the device since the last call; the caller frees the slots."""
        return self._doomed.collect()

    def collect_doomed_host(self) -> list[HostVictim]:
        """What doomed branches gave up on the host since the last call; the caller frees the slots."""
        return self._doomed.collect_host()

    def reset(self) -> None:
        """Forget everything but the base model's node; no victims: the caller clears both pools.

        Nodes handed out before are void: locking or unlocking one raises.
        """
        self.parts.clear()

    def check(self, payload_slots: Callable[[Any], Iterable[int]] | None = None) -> None:
        """Walk the whole tree and raise :class:`InvariantError` at the first broken rule (:mod:`.checks`)."""
        check_parts(self.parts, payload_slots)
