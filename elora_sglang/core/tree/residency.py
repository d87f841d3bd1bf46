"""Which nodes hold slots on which tier, what that adds up to, and which of them may leave.

Both tiers are prefix-closed: what is above a node with device slots has device slots, what is above a node
with host slots has host slots. So only leaves of a tier leave it, and only children of a tier's nodes enter it.
"""

from __future__ import annotations

from typing import Any

from elora_sglang.core.errors import InvariantError
from elora_sglang.core.policies.base import Policy
from elora_sglang.core.tree.candidates import Candidates
from elora_sglang.core.tree.node import HostVictim, Node, Victim
from elora_sglang.core.tree.structure import PayloadOps, TreeStructure

#: Keys of guarded nodes start here, so that they leave after all others; policies stay far below.
GUARDED = 1e18
_STEP = 1024.0  # the spacing of floats at GUARDED is 128: neighbouring ranks stay apart


class ResidentTree(TreeStructure):
    """Sizes, locks, guards and eviction candidates of both tiers; construction as in :class:`TreeStructure`.

    Attributes:
        evictable_size: device slots that no lock or pin holds, and those of victims not collected yet.
        protected_size: device slots of nodes that are locked or pinned.
        host_size: host slots in use.
        adapter_size: device slots in use by adapters.
        invalid_kv_size: device slots of KV whose adapter has none: 0 unless the policy gave up the dependency.
    """

    def __init__(self, page_size: int, policy: Policy, payloads: PayloadOps) -> None:
        super().__init__(page_size, policy, payloads)
        self._independent = not policy.dependency
        self._kv_candidates = Candidates("queued", self._device_key, self._may_leave)
        self._adapter_candidates = Candidates("queued", self._device_key, self._may_leave)
        self._host_candidates = Candidates("host_queued", self._host_key, self._may_leave_host)
        self._orphans: list[Victim] = []
        self._host_orphans: list[HostVictim] = []
        self._orphan_size = 0
        self._pinned_size = 0
        self.evictable_size = 0
        self.protected_size = 0
        self.host_size = 0
        self.adapter_size = 0
        self.invalid_kv_size = 0

    # -- candidates -------------------------------------------------------------------------------

    def _device_key(self, node: Node) -> float:
        return self.policy.priority(node) if not node.guard else GUARDED - _STEP * node.guard

    def _host_key(self, node: Node) -> float:
        return self.policy.host_priority(node) if not node.guard else GUARDED - _STEP * node.guard

    def _may_leave(self, node: Node) -> bool:
        if self._independent and node.kind == "adapter":
            return node.evictable and node.size > 0
        return node.is_candidate

    @staticmethod
    def _may_leave_host(node: Node) -> bool:
        return node.is_host_candidate

    def _offer(self, node: Node) -> None:
        """Make ``node`` an eviction candidate of each tier that it may leave."""
        if node.resident and node.queued is None:
            (self._kv_candidates if node.kind == "kv" else self._adapter_candidates).offer(node)
        if node.host and node.host_queued is None:
            self._host_candidates.offer(node)

    def reprioritize(self, node: Node) -> None:
        """A policy calls this when a priority of ``node`` fell without a use of the node."""
        (self._kv_candidates if node.kind == "kv" else self._adapter_candidates).lowered(node)
        self._host_candidates.lowered(node)
        self._compact()

    def _compact(self) -> None:
        nodes = self.nodes
        self._kv_candidates.compact(nodes)
        self._adapter_candidates.compact(nodes)
        self._host_candidates.compact(nodes)

    # -- entering and leaving a tier --------------------------------------------------------------

    def _enter_device(self, node: Node, payload: Any) -> None:
        assert not node.resident and node.parent is not None
        node.resident, node.payload = True, payload
        node.parent.resident_children += 1
        if node.evictable:
            self.evictable_size += node.size
        else:
            self.protected_size += node.size
        if node.kind == "adapter":
            self.adapter_size += node.size
            if self._independent:
                self.invalid_kv_size -= self._resident_kv(node)
        elif self._independent and not self.adapter_of(node).resident:
            self.invalid_kv_size += node.size
        self.policy.on_insert(node)

    def _leave_device(self, node: Node) -> Any:
        """Take the device slots of a node that nothing uses; returns their payload."""
        outlived = self._independent and node.kind == "adapter"
        if (node.locks and not (outlived and self._only_saved(node))) or (
            node.resident_children and not outlived
        ):
            raise InvariantError(f"I4: {node!r} is in use and cannot leave")
        assert node.resident and node.parent is not None
        if node.evictable:
            self.evictable_size -= node.size
        else:  # pinned, or held by saves, and its load failed
            self.protected_size -= node.size
        payload, node.payload, node.resident = node.payload, None, False
        node.parent.resident_children -= 1
        if node.parent.transfer is not None:
            self.transfers[node.parent.transfer].outlived.discard(node.id)
        if node.kind == "adapter":
            self.adapter_size -= node.size
            if self._independent:
                self.invalid_kv_size += self._resident_kv(node)
        elif self._independent and not self.adapter_of(node).resident:
            self.invalid_kv_size -= node.size
        self.policy.on_evict(node)
        return payload

    def _enter_host(self, node: Node) -> None:
        assert not node.host and node.parent is not None
        node.host = True
        node.parent.host_children += 1
        self.host_size += node.size
        self.reprioritize(node)  # what has a host copy is cheaper to lose

    def _leave_host(self, node: Node) -> Any:
        """Take the host slots of a host leaf; returns their payload."""
        if node.host_children:
            raise InvariantError(f"I1: {node!r} has children on the host and cannot leave it")
        assert node.host and node.parent is not None
        payload, node.host_payload, node.host = node.host_payload, None, False
        node.parent.host_children -= 1
        self.host_size -= node.size
        return payload

    def _saves_below(self, adapter: Node) -> int:
        """How many locks of an adapter are those of saves of KV below it, which read nothing of its own."""
        anchors = (t.anchor for t in self.transfers.values() if t.kind == "save" and t.anchor is not None)
        return sum(anchor.adapter is adapter for anchor in anchors)

    def _only_saved(self, adapter: Node) -> bool:
        return adapter.locks == self._saves_below(adapter)

    def _resident_kv(self, adapter: Node) -> int:
        return sum(node.size for node in self.walk(adapter) if node.kind == "kv" and node.resident)

    # -- locks ------------------------------------------------------------------------------------

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

        What a doomed branch frees by it is handed out by ``collect_doomed`` (or the next eviction), and its
        device slots count as evictable until then.
        """
        self._require_present(node)
        if node.locks < 1:
            raise InvariantError(f"{node!r} is not locked")
        root, moved, anchor = self.root, 0, node
        doomed = self.is_doomed(node)
        while node is not root:
            node.locks -= 1
            if not node.locks:
                if node.resident and not node.pinned:
                    moved += node.size
                self._offer(node)  # in a doomed branch too: a copy further down may hold it for a while
            node = node.parent  # type: ignore[assignment]  # only the root has none
        self._protect(-moved)
        if doomed:
            self._reap(anchor)
            self._compact()

    def _protect(self, size: int) -> None:
        self.evictable_size -= size
        self.protected_size += size

    # -- guards -----------------------------------------------------------------------------------

    def guard(self, node: Node, rank: int) -> None:
        """Waiting request ``rank`` (1, 2, ... in order of arrival) needs ``node`` and all above it.

        Guarded nodes are evicted after all others, those that only late requests need first. They still
        count as evictable: a guard never makes memory unavailable.
        """
        self._require_present(node)
        if rank < 1:
            raise ValueError(f"a guard's rank must be at least 1, got {rank}")
        guarded = self._guarded.setdefault(rank, {})
        while node is not self.root:
            guarded[node.id] = node
            node.guard = min(node.guard, rank) if node.guard else rank
            node = node.parent  # type: ignore[assignment]  # only the root has none

    def guarded_size(self, rank: int) -> int:
        """Evictable device slots of what waiting requests up to ``rank`` need. O(their nodes)."""
        needed = {
            id: node for other, nodes in self._guarded.items() if other <= rank for id, node in nodes.items()
        }
        return sum(node.size for node in needed.values() if node.evictable)

    def unguard(self, rank: int) -> None:
        """Release all guards of the request; does nothing when it has none."""
        for node in self._guarded.pop(rank, {}).values():
            if node.guard == rank and node.parent is not None:
                others = [other for other, nodes in self._guarded.items() if node.id in nodes]
                node.guard = min(others, default=0)
                self.reprioritize(node)

    # -- doomed branches --------------------------------------------------------------------------

    def _reap(self, node: Node) -> None:
        """Take out of a doomed branch what nothing holds any more, from ``node`` upwards."""
        while node.doomed or node.kind == "kv":
            parent = node.parent
            if parent is None or node.locks:
                return
            if node.children or node.transfer is not None:
                self._offer(node)  # a copy below it may take a while; its device slots need not wait
                return
            self._remove(node)
            node = parent

    def _remove(self, node: Node) -> None:
        """Node of a doomed branch: off both tiers into the orphans, and out of the tree."""
        if node.resident:
            payload = self._leave_device(node)
            self.evictable_size += node.size  # until it is collected
            self._orphan_size += node.size
            self._orphans.append(Victim(node.id, node.kind, node.key, payload, node.size))
        if node.host:
            payload = self._leave_host(node)
            self._host_orphans.append(HostVictim(node.id, node.kind, node.key, payload, node.size, True))
        self.policy.on_drop(node)
        self._detach(node)
