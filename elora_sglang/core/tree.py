"""The dependency tree: root → adapter → KV, all in one pool of slots.

KV hangs below the adapter it was computed under, so locking a KV node pins its adapter, and eviction,
which takes only nodes without resident children, can never leave KV without its adapter or its prefix. The
tree owns structure and sizes; slots and bytes belong to the runtime, which the tree reaches through
:class:`PayloadOps` only. Time is a counter of operations.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from elora_sglang.core.candidates import Candidates
from elora_sglang.core.checks import check_tree
from elora_sglang.core.errors import InvariantError
from elora_sglang.core.node import DroppedBranch, Insert, Match, Node, Victim
from elora_sglang.core.policy import Policy
from elora_sglang.core.structure import PayloadOps, TreeStructure

__all__ = [
    "DependencyTree",
    "DroppedBranch",
    "Insert",
    "InvariantError",
    "Match",
    "Node",
    "PayloadOps",
    "Victim",
]


class DependencyTree(TreeStructure):
    """Adapters and KV of one pool. Single-threaded; the same calls give the same results everywhere.

    Construction as in :class:`TreeStructure`; ``policy`` ranks what eviction takes.

    Attributes:
        base: the base model's adapter node: key ``None``, size 0, always resident, never evicted.
        evictable_size: slots of resident nodes that no lock or pin holds, and of victims not collected yet.
        protected_size: slots of resident nodes that are locked or pinned.
    """

    def __init__(self, page_size: int, policy: Policy, payloads: PayloadOps) -> None:
        super().__init__(page_size, policy, payloads)
        self._candidates = Candidates(policy)
        self._orphans: list[Victim] = []
        self._orphan_size = 0
        self._pinned_size = 0
        self.evictable_size = 0
        self.protected_size = 0

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
        node.resident, node.payload = True, payload
        self.tick += 1
        node.last_tick = self.tick
        if node.evictable:
            self.evictable_size += node.size
        else:
            self.protected_size += node.size
        self.policy.on_insert(node)
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
        """Longest resident prefix of ``tokens[:limit]`` below ``adapter``, in whole pages.

        Uses the path (tick, visits, policy) and splits the last node when the match ends inside it, so that
        the returned node ends where the match ends. A miss returns the adapter with length 0, never the root.
        ``peek`` changes nothing at all; its node may reach beyond the match.
        """
        self._require_adapter(adapter)
        if peek:
            return Match(*self._descend(adapter, tokens, self._pages(tokens, limit), namespace, cut=False))
        self.tick += 1
        node, length = self._descend(adapter, tokens, self._pages(tokens, limit), namespace, uses=1)
        self.policy.on_access(node)
        return Match(node, length)

    def insert(
        self, adapter: Node, tokens: array[int], namespace: Hashable, payload: Any, length: int | None = None
    ) -> Insert:
        """Put the KV of ``tokens[:length]`` below ``adapter``; ``payload`` covers at least these tokens.

        The tree keeps only the payload of the whole pages that were missing; slots ``[0, matched)`` and any
        part page stay the caller's. Uses the path, but counts no visit.

        Raises:
            InvariantError: the adapter is not resident, or was unloaded.
        """
        self._require_adapter(adapter)
        if not adapter.resident:
            raise InvariantError(f"KV cannot be inserted below {adapter!r}: it is not resident")
        n = self._pages(tokens, length)
        self.tick += 1
        node, matched = self._descend(adapter, tokens, n, namespace)
        if matched < n:
            key = self._key(tokens, matched, namespace)
            tail = self.payloads.slice(payload, matched, n)
            parent, node = node, self._node("kv", key, node, n - matched, tokens[matched:n])
            node.resident, node.payload, node.last_tick = True, tail, self.tick
            parent.children[key] = node
            self.evictable_size += node.size
            self._kv_count += 1
            self.policy.on_insert(node)
            self._offer(node)
        self.policy.on_access(node)
        return Insert(node, matched)

    # -- locks ----------------------------------------------------------------------------------

    def lock(self, node: Node) -> None:
        """Pin ``node`` and everything above it, its adapter included; sizes move to protected.

        Raises:
            InvariantError: ``node`` has left the tree, or is the root, whose lock would pin no adapter.
        """
        self._require_present(node)
        root, moved = self.root, 0
        while node is not root:
            if not node.locks and node.resident and not node.pinned:
                moved += node.size
            node.locks += 1
            node = node.parent  # type: ignore[assignment]  # only the root has none
        self._protect(moved)

    def unlock(self, node: Node) -> None:
        """Take back one :meth:`lock` of ``node``.

        What a doomed branch frees by it is handed out by :meth:`collect_doomed` (or the next :meth:`evict`),
        and counts as evictable until then.
        """
        self._require_present(node)
        if node.locks < 1:
            raise InvariantError(f"{node!r} is not locked")
        root, moved = self.root, 0
        doomed = self.is_doomed(node)
        while node is not root:
            parent = node.parent
            node.locks -= 1
            if not node.locks and node.resident and not node.pinned:
                moved += node.size
                if not node.children and node.queued is None and not doomed:
                    self._offer(node)
            if doomed and not node.locks:
                self._orphan_size += node.size if node.resident else 0
                self._orphans.extend(self._remove(node))
            node = parent  # type: ignore[assignment]  # only the root has none
        self._protect(-moved)

    def _protect(self, size: int) -> None:
        self.evictable_size -= size
        self.protected_size += size

    def _offer(self, node: Node) -> None:
        if node.is_candidate:
            self._candidates.offer(node)

    # -- leaving ----------------------------------------------------------------------------------

    def evict(self, need: int) -> list[Victim]:
        """Free at least ``need`` slots, or all that can be freed; the caller frees the victims' slots.

        Takes KV leaves and adapters without resident KV, never what is locked or pinned, in the policy's
        order; O(log n) amortised a victim. An evicted adapter stays registered.
        """
        freed = self._orphan_size
        victims = self.collect_doomed()
        while freed < need:
            node = self._candidates.pop()
            if node is None:
                break
            freed += node.size
            self.evictable_size -= node.size
            parent = node.parent
            victims.append(self._leave(node))
            if parent is not None:
                self._offer(parent)
        self._candidates.compact(self.nodes)
        return victims

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
        if adapter.parent is not None and not adapter.doomed:
            self.set_pinned(adapter, False)
            del self.root.children[adapter.key]
            adapter.doomed = True
            self._doomed[adapter.id] = adapter
            for node in reversed(list(self.walk(adapter))):
                if not node.locks:
                    self.evictable_size -= node.size if node.resident else 0
                    victims.extend(self._remove(node))
            self._candidates.compact(self.nodes)
        return DroppedBranch(victims, sum(node.size for node in self.walk(adapter) if node.resident))

    def collect_doomed(self) -> list[Victim]:
        """What unlocking freed of doomed branches since the last call; the caller frees their slots."""
        victims, self._orphans = self._orphans, []
        self.evictable_size -= self._orphan_size
        self._orphan_size = 0
        return victims

    def has_doomed(self, key: str) -> bool:
        """Whether an unloaded version of ``key`` still holds slots that were not handed out."""
        waiting = any(victim.key == key and victim.kind == "adapter" for victim in self._orphans)
        return waiting or any(node.key == key for node in self._doomed.values())

    def _leave(self, node: Node) -> Victim:
        # An unlocked node without children gives up its slots. Sizes are the caller's business.
        if node.locks or node.children:
            raise InvariantError(f"I4: {node!r} is in use and cannot leave")
        victim = Victim(node.id, node.kind, node.key, node.payload, node.size)
        self.policy.on_evict(node)
        if node.kind == "kv":
            self._detach(node)
        else:
            node.resident, node.payload = False, None
        return victim

    def _remove(self, node: Node) -> list[Victim]:
        # The node of a doomed branch goes for good; an adapter that was not resident gives nothing back.
        victims = [self._leave(node)] if node.resident else []
        if node.kind == "adapter":
            self._detach(node)
        return victims

    def reprioritize(self, node: Node) -> None:
        """A policy calls this when the priority of ``node`` fell without a use of the node."""
        self._candidates.lowered(node)
        self._candidates.compact(self.nodes)

    def reset(self) -> None:
        """Forget everything but the base model's node; no victims: the caller clears the whole pool.

        Nodes handed out before are void: locking or unlocking one raises.
        """
        for node in list(self.walk()):
            if node is not self.root and node is not self.base:
                node.parent, node.resident, node.payload = None, False, None
        self.base.children, self.base.locks = {}, 0
        self.root.children, self.root.locks = {None: self.base}, 0
        self._doomed = {}
        self._candidates.clear()
        self._orphans, self._orphan_size = [], 0
        self._kv_count = self._pinned_size = self.evictable_size = self.protected_size = 0
        self.policy.on_reset()

    def check(self, payload_slots: Callable[[Any], Iterable[int]] | None = None) -> None:
        """Walk the whole tree and raise :class:`InvariantError` at the first broken rule (:mod:`.checks`)."""
        check_tree(self, payload_slots)
