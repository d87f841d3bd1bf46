"""Who may leave each tier, and in which order.

The rule that keeps this right: **whoever makes a node a candidate offers it.** A node may leave the device when it has
slots there, no lock, no pin and no child on the device; it may leave the host when it has slots there, no lock, no
copy in flight and no child on the host. So there are six ways to become a candidate, and each has one place:

======================================  ==============================================================
gains slots that need no copy           :meth:`Residency.enter_device`, :meth:`Residency.enter_host`
last child leaves the device            :meth:`Residency.give_up_device` offers the parent
last child leaves the host              :meth:`Residency.give_up_host` offers the parent
last lock goes                          :meth:`Locks.unlock` offers every node of the path
pin goes                                :meth:`Locks.set_pinned`
copy in flight ends                     :meth:`Transfers.end` offers its nodes
======================================  ==============================================================

What leaves the tree for good (:meth:`DoomedBranches.reap`) offers what it leaves behind. A split makes no candidate:
its upper half has a child on every tier that it is on, its lower half keeps the entries it had.
"""

from __future__ import annotations

from elora_sglang.core.tree.candidates import SMALL, Candidates
from elora_sglang.core.tree.node import Kind, Node
from elora_sglang.core.tree.ranking import Ranking
from elora_sglang.core.tree.structure import Structure

#: Keys of guarded nodes start here, so that they leave after all others; policies stay far below.
GUARDED = 1e18
_STEP = 1024.0  # the spacing of floats at GUARDED is 128: neighbouring ranks stay apart


class EvictionOrder:
    """Candidates of both tiers; on the device KV and adapters apart, because a policy may choose between the two.

    Attributes:
        kv, adapters, host: the candidates.
        independent: the policy gave up the dependency: an adapter may leave although KV below it is resident.
    """

    def __init__(self, structure: Structure, ranking: Ranking) -> None:
        self._structure = structure
        self._ranking = ranking
        self.independent = not ranking.dependency
        self.kv = Candidates("queued", self._device_key, self._may_leave_device)
        self.adapters = Candidates("queued", self._device_key, self._may_leave_device)
        self.host = Candidates("host_queued", self._host_key, self._may_leave_host)

    def _device_key(self, node: Node) -> float:
        return self._ranking.priority(node) if not node.guard else GUARDED - _STEP * node.guard

    def _host_key(self, node: Node) -> float:
        return self._ranking.host_priority(node) if not node.guard else GUARDED - _STEP * node.guard

    def _may_leave_device(self, node: Node) -> bool:
        if self.independent and node.kind == "adapter":
            return node.evictable and node.size > 0
        return node.is_candidate

    @staticmethod
    def _may_leave_host(node: Node) -> bool:
        return node.is_host_candidate

    def offer(self, node: Node) -> None:
        """Make ``node`` a candidate of each tier that it may leave; see the rule above."""
        if node.resident and node.queued is None:
            (self.kv if node.kind == "kv" else self.adapters).offer(node)
        if node.host and node.host_queued is None:
            self.host.offer(node)

    def reprioritize(self, node: Node) -> None:
        """A priority of ``node`` fell: its entries follow."""
        on_device = (self.kv if node.kind == "kv" else self.adapters).lowered(node)
        if self.host.lowered(node) or on_device:
            self.compact()

    def compact(self) -> None:
        """Drop outdated entries where they outnumber the nodes, so that the heaps stay O(nodes)."""
        nodes = self._structure.nodes
        most = 2 * nodes + SMALL
        for candidates in (self.kv, self.adapters, self.host):
            if len(candidates) > most:
                candidates.compact(nodes)

    def choose(self, need: Kind, used_by_adapters: int) -> Candidates | None:
        """The candidates from which the next device victim comes, to make room for a ``need``; ``None``: no victim."""
        kv, adapter = self.kv.peek(), self.adapters.peek()
        if kv is None or adapter is None:
            if kv is None and adapter is None:
                return None
            return self.adapters if kv is None else self.kv
        side = None if kv.guard or adapter.guard else self._ranking.side(need, used_by_adapters)
        if side is not None:
            return self.kv if side == "kv" else self.adapters
        assert kv.queued is not None and adapter.queued is not None
        return self.kv if (kv.queued, kv.id) < (adapter.queued, adapter.id) else self.adapters

    def clear(self) -> None:
        """Nobody is a candidate."""
        for candidates in (self.kv, self.adapters, self.host):
            candidates.clear()
