"""The dependency tree: root → adapter → KV, on two tiers of slots.

KV hangs below the adapter it was computed under, so locking a KV node pins its adapter, and eviction,
which takes only leaves of a tier, can never leave KV without its adapter or its prefix. The tree owns structure
and sizes; slots and bytes belong to the runtime, which the tree reaches through :class:`PayloadOps` only. Time
is a counter of operations, and :attr:`DependencyTree.now` as its owner sets it.

The class is built in layers, one file each: :mod:`.structure` (nodes, keys, the walk), :mod:`.residency` (sizes,
locks, guards, candidates), :mod:`.tiers` (eviction and copies in flight), and this one.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from elora_sglang.core.errors import InvariantError
from elora_sglang.core.tree.checks import check_tree
from elora_sglang.core.tree.node import DroppedBranch, HostVictim, Insert, Match, Node, Transfer, Victim
from elora_sglang.core.tree.structure import PayloadOps
from elora_sglang.core.tree.tiers import Ended, TieredTree

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


class DependencyTree(TieredTree):
    """Adapters and KV of one pool. Single-threaded; the same calls give the same results everywhere.

    Construction as in :class:`~.structure.TreeStructure`; ``policy`` ranks what eviction takes. ``base`` is the
    base model's adapter node: key ``None``, size 0, always on both tiers, never evicted.
    """

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
            node = self._node("adapter", key, self.root, size)
            self.root.children[key] = node
        elif node.size != size:
            raise InvariantError(
                f"adapter {key!r} is registered with {node.size} slots, not {size}; drop it first"
            )
        self.set_pinned(node, pinned)
        return node

    def set_pinned(self, node: Node, pinned: bool) -> None:
        """Pin or unpin an adapter; a pinned one is never evicted and counts as protected while resident."""
        self._require_adapter(node)
        if pinned == node.pinned or node is self.base:
            return
        was_evictable = node.evictable
        node.pinned = pinned
        self._pinned_size += node.size if pinned else -node.size
        if was_evictable != node.evictable:
            self._protect(node.size if was_evictable else -node.size)
        self._offer(node)

    def pinned_size(self, *, excluding: Node | None = None) -> int:
        """Slots that pinned adapters take or may take at any time, resident or not, in slots."""
        return self._pinned_size - (excluding.size if excluding is not None and excluding.pinned else 0)

    def make_resident(self, node: Node, payload: Any) -> None:
        """The adapter's weights now lie in the slots of ``payload``; its size counts from here on."""
        self._require_adapter(node)
        if node.resident:
            raise InvariantError(f"{node!r} is resident already")
        self.tick += 1
        node.last_tick, node.last_use = self.tick, self.now
        self._enter_device(node, payload)
        self._offer(node)

    # -- match and insert -------------------------------------------------------------------------

    def match(
        self,
        adapter: Node,
        tokens: array[int],
        namespace: Hashable = None,
        limit: int | None = None,
        *,
        peek: bool = False,
    ) -> Match:
        """Longest prefix of ``tokens[:limit]`` below ``adapter`` that either tier has, in whole pages.

        Uses the path (tick, policy) but counts no use, and splits the last node when the match ends inside it,
        so that a node ends where the match ends. A miss returns the adapter with length 0, never the root.
        ``peek`` changes nothing at all; its nodes may reach beyond the match.
        """
        self._require_adapter(adapter)
        n = self._pages(tokens, limit)
        if peek:
            return self.by_tier(*self._descend(adapter, tokens, n, namespace, cut=False), adapter)
        self.tick += 1
        node, length = self._descend(adapter, tokens, n, namespace)
        self.policy.on_access(node)
        return self.by_tier(node, length, adapter)

    def find(self, adapter: Node, tokens: array[int], namespace: Hashable = None) -> tuple[Node, int]:
        """The last node that shares tokens with ``tokens``, on whatever tier, and how many do; changes nothing."""
        self._require_adapter(adapter)
        return self._descend(adapter, tokens, self._pages(tokens, None), namespace, cut=False)

    def still_ends(self, node: Node, length: int, tokens: array[int]) -> bool:
        """Whether a walk along ``tokens`` that ended with KV ``node``, after ``length`` tokens, still does. O(1).

        A node's path says the same tokens for as long as it is in the tree, however it is split: a split node
        keeps its end. So only what hangs below it can have changed the answer.
        """
        if node.parent is None:
            return False
        n = len(tokens)
        return length >= n - n % self.page_size or self._key(tokens, length, None) not in node.children

    def touch(self, node: Node) -> None:
        """What :meth:`match` does to a path, where it is known to end at ``node`` (see :meth:`still_ends`)."""
        self.tick = tick = self.tick + 1
        one, root = node, self.root
        while one is not root:
            one.last_tick = tick
            one = one.parent  # type: ignore[assignment]  # only the root has none
        self.policy.on_access(node)

    @staticmethod
    def by_tier(node: Node, length: int, adapter: Node) -> Match:
        """The match of a walk below ``adapter`` that ended in ``node``, after ``length`` tokens; changes nothing."""
        if node.resident:
            return Match(node, length, node, 0)
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
        return Match(device, device_length, host, position - device_length)

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
        self._require_adapter(adapter)
        if not adapter.resident:
            raise InvariantError(f"KV cannot be inserted below {adapter!r}: it is not resident")
        n = self._pages(tokens, length)
        self.tick += 1
        node, present = self._descend(adapter, tokens, n, namespace)
        matched = present
        if not node.resident:
            returning = self.missing(node)
            matched = start = present - sum(one.size for one in returning)
            for one in returning:
                self._enter_device(one, self.payloads.slice(payload, start, start + one.size))
                start += one.size
            self._offer(node)
        if present < n:
            key = self._key(tokens, present, namespace)
            tail = self.payloads.slice(payload, present, n)
            parent, node = node, self._node("kv", key, node, n - present, tokens[present:n])
            node.last_tick, node.last_use = self.tick, self.now
            parent.children[key] = node
            self._kv_count += 1
            self._enter_device(node, tail)
            self._offer(node)
        self.policy.on_access(node)
        return Insert(node, matched)

    def count_use(self, node: Node) -> None:
        """Count one use of ``node`` and all above it, the adapter first: visits, time, policy."""
        self._require_present(node)
        path = [self.adapter_of(node), *self.path(node)]
        for one in path:
            one.visits += 1
            one.last_use = self.now
            self.policy.on_use(one)

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
        waiting, self._orphans = self._orphans, []
        host_waiting, self._host_orphans = self._host_orphans, []
        waiting_size, self._orphan_size = self._orphan_size, 0
        if adapter.parent is not None and not adapter.doomed:
            self.set_pinned(adapter, False)
            del self.root.children[adapter.key]
            adapter.doomed = True
            self._doomed[adapter.id] = adapter
            for node in reversed(list(self.walk(adapter))):
                self._reap(node)
            self._compact()
        victims, host_victims = self.collect_doomed(), self.collect_doomed_host()
        self._orphans, self._orphan_size, self._host_orphans = waiting, waiting_size, host_waiting
        left = sum(node.size for node in self.walk(adapter) if node.resident)
        return DroppedBranch(victims, left, host_victims)

    def has_doomed(self, key: str) -> bool:
        """Whether an unloaded version of ``key`` still holds slots that were not handed out."""
        waiting = any(victim.key == key and victim.kind == "adapter" for victim in self._orphans)
        return waiting or any(node.key == key for node in self._doomed.values())

    def reset(self) -> None:
        """Forget everything but the base model's node; no victims: the caller clears both pools.

        Nodes handed out before are void: locking or unlocking one raises.
        """
        for node in list(self.walk()):
            node.locks = node.guard = 0
            if node is not self.root and node is not self.base:
                node.parent, node.payload, node.host_payload, node.transfer = None, None, None, None
                node.resident = node.host = False
        self.base.children, self.base.resident_children, self.base.host_children = {}, 0, 0
        self.root.children, self.root.resident_children, self.root.host_children = {None: self.base}, 1, 1
        self._doomed, self.transfers, self._guarded = {}, {}, {}
        for candidates in (self._kv_candidates, self._adapter_candidates, self._host_candidates):
            candidates.clear()
        self._orphans, self._orphan_size, self._host_orphans = [], 0, []
        self._kv_count = self._pinned_size = self.evictable_size = self.protected_size = 0
        self.host_size = self.adapter_size = self.invalid_kv_size = 0
        self.policy.on_reset()

    def check(self, payload_slots: Callable[[Any], Iterable[int]] | None = None) -> None:
        """Walk the whole tree and raise :class:`InvariantError` at the first broken rule (:mod:`.checks`)."""
        check_tree(self, payload_slots)
