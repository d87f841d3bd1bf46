"""Which nodes hold slots on which tier, and what that adds up to.

Both tiers are prefix-closed: what is above a node with device slots has device slots, what is above a node
with host slots has host slots. So only leaves of a tier leave it, and only children of a tier's nodes enter it.
"""

from __future__ import annotations

from typing import Any

from elora_sglang.core.errors import InvariantError
from elora_sglang.core.tree.node import HostVictim, Node, Victim
from elora_sglang.core.tree.order import EvictionOrder
from elora_sglang.core.tree.payloads import PayloadOps
from elora_sglang.core.tree.ranking import Ranking
from elora_sglang.core.tree.structure import Structure


class Residency:
    """The books of both tiers, in slots.

    Attributes:
        evictable_size: device slots that no lock or pin holds.
        protected_size: device slots of nodes that are locked or pinned.
        host_size: host slots in use.
        adapter_size: device slots in use by adapters.
        invalid_kv_size: device slots of KV whose adapter has none: 0 unless the policy gave up the dependency.
        arrivals: how often a node got device slots; :attr:`Node.arrival` is its value at the node's turn.
    """

    def __init__(
        self, structure: Structure, ranking: Ranking, payloads: PayloadOps, order: EvictionOrder
    ) -> None:
        self._structure = structure
        self._ranking = ranking
        self._payloads = payloads
        self._order = order
        self.clear()

    def clear(self) -> None:
        """The tree was emptied: all but the base model, which takes no slots, is gone from both tiers."""
        self.evictable_size: int = 0
        self.protected_size: int = 0
        self.host_size: int = 0
        self.adapter_size: int = 0
        self.invalid_kv_size: int = 0
        self.arrivals: int = 0
        root, base = self._structure.root, self._structure.base
        base.resident = base.host = True
        base.resident_children = base.host_children = 0
        root.resident_children = root.host_children = 1

    def protect(self, size: int) -> None:
        """``size`` slots that were evictable are locked or pinned now; negative: the other way round."""
        self.evictable_size -= size
        self.protected_size += size

    # -- the device -------------------------------------------------------------------------------

    def enter_device(self, node: Node, payload: Any, *, in_flight: bool = False) -> None:
        """``node`` has device slots from now on. ``in_flight``: its bytes come later, and it is locked until then."""
        parent = node.parent
        assert not node.resident and parent is not None
        node.resident, node.payload = True, payload
        self.arrivals += 1
        node.arrival = self.arrivals
        parent.resident_children += 1
        if node.evictable:
            self.evictable_size += node.size
        else:
            self.protected_size += node.size
        if node.kind == "adapter":
            self.adapter_size += node.size
            if self._order.independent:
                self.invalid_kv_size -= self._resident_kv(node)
        elif self._order.independent and not self._adapter_is_resident(node):
            self.invalid_kv_size += node.size
        self._ranking.on_insert(node)
        if not in_flight:
            self._order.offer(node)

    def give_up_device(self, node: Node, locks_of_saves: int = 0) -> Any:
        """Take the device slots of a node that nothing uses; returns their payload. The parent may follow.

        ``locks_of_saves``: locks of an adapter by saves of KV that outlived it; they need nothing of its own.
        """
        payload = self._leave_device(node, locks_of_saves)
        assert node.parent is not None
        self._order.offer(node.parent)
        return payload

    def _leave_device(self, node: Node, locks_of_saves: int = 0) -> Any:
        may_outlive = self._order.independent and node.kind == "adapter"
        if node.locks != locks_of_saves or (node.resident_children and not may_outlive):
            raise InvariantError(f"I4: {node!r} is in use and cannot leave")
        assert node.resident and node.parent is not None
        if node.evictable:
            self.evictable_size -= node.size
        else:  # pinned, or held by saves, and its load failed
            self.protected_size -= node.size
        payload, node.payload, node.resident = node.payload, None, False
        node.parent.resident_children -= 1
        if node.kind == "adapter":
            self.adapter_size -= node.size
            if self._order.independent:
                self.invalid_kv_size += self._resident_kv(node)
        elif self._order.independent and not self._adapter_is_resident(node):
            self.invalid_kv_size -= node.size
        self._ranking.on_evict(node)
        return payload

    @staticmethod
    def _adapter_is_resident(node: Node) -> bool:
        return node.adapter is not None and node.adapter.resident

    def _resident_kv(self, adapter: Node) -> int:
        below = self._structure.walk(adapter)
        return sum(node.size for node in below if node.kind == "kv" and node.resident)

    # -- the host ---------------------------------------------------------------------------------

    def enter_host(self, node: Node, payload: Any, *, in_flight: bool = False) -> None:
        """``node`` has host slots from now on. ``in_flight``: its bytes come later."""
        assert not node.host and node.parent is not None
        node.host, node.host_payload = True, payload
        node.parent.host_children += 1
        self.host_size += node.size
        self._order.reprioritize(node)  # what has a host copy is cheaper to lose
        if not in_flight:
            self._order.offer(node)

    def give_up_host(self, node: Node) -> HostVictim:
        """Take the host slots of a host leaf. The parent may follow.

        What has no device slots is gone then: KV leaves the tree, an adapter has only its file.
        """
        parent = node.parent
        assert parent is not None
        payload, gone = self._leave_host(node), not node.resident
        if gone:
            self.drop(node)
        self._order.offer(parent)
        return HostVictim(node.id, node.kind, node.key, payload, node.size, gone)

    def _leave_host(self, node: Node) -> Any:
        if node.host_children:
            raise InvariantError(f"I1: {node!r} has children on the host and cannot leave it")
        assert node.host and node.parent is not None
        payload, node.host_payload, node.host = node.host_payload, None, False
        node.parent.host_children -= 1
        self.host_size -= node.size
        return payload

    # -- slots of copies in flight ----------------------------------------------------------------

    @staticmethod
    def name_device_slots(node: Node, payload: Any) -> None:
        """The device slots of a node that is being loaded."""
        if not node.resident or node.payload is not None:
            raise InvariantError(f"{node!r} waits for no device slots")
        node.payload = payload

    @staticmethod
    def name_host_slots(node: Node, payload: Any) -> None:
        """The host slots of a node that is being saved or read."""
        if not node.host or node.host_payload is not None:
            raise InvariantError(f"{node!r} waits for no host slots")
        node.host_payload = payload

    # -- both -------------------------------------------------------------------------------------

    def drop(self, node: Node) -> None:
        """``node`` has just given up its last slots: KV leaves the tree, an adapter has only its file."""
        self._ranking.on_drop(node)
        if node.kind == "kv":
            self._structure.remove(node)

    def remove(self, node: Node) -> tuple[Victim | None, HostVictim | None]:
        """Take ``node``, of a doomed branch, off both tiers and out of the tree. Offers nobody: the caller goes on."""
        victim = host_victim = None
        if node.resident:
            victim = Victim(node.id, node.kind, node.key, self._leave_device(node), node.size)
        if node.host:
            host_victim = HostVictim(
                node.id, node.kind, node.key, self._leave_host(node), node.size, gone=True
            )
        self._ranking.on_drop(node)
        self._structure.remove(node)
        return victim, host_victim

    def split(self, upper: Node, lower: Node, at: int) -> None:
        """``upper`` is new and took the first ``at`` tokens of ``lower``: it takes their slots on each tier."""
        if lower.resident:
            upper.payload, lower.payload = self._payloads.split(lower.payload, at)
            upper.resident_children = 1
        if lower.host:
            upper.host_payload, lower.host_payload = self._payloads.split(lower.host_payload, at)
            upper.host_children = 1
