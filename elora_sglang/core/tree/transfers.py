"""Copies between the tiers that are in flight: what they bring, whom they hold, and how they end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from elora_sglang.core.errors import InvariantError
from elora_sglang.core.tree.doomed import DoomedBranches
from elora_sglang.core.tree.locks import Locks
from elora_sglang.core.tree.node import HostVictim, Node, Transfer, Victim
from elora_sglang.core.tree.order import EvictionOrder
from elora_sglang.core.tree.residency import Residency
from elora_sglang.core.tree.structure import Structure


class Ended(NamedTuple):
    """What the end of a transfer freed; both lists are empty when it succeeded."""

    victims: list[Victim]
    host_victims: list[HostVictim]


class Transfers:
    """Begins and ends copies; moves no bytes itself.

    Attributes:
        by_id: copies in flight.
    """

    def __init__(
        self,
        structure: Structure,
        residency: Residency,
        locks: Locks,
        doomed: DoomedBranches,
        order: EvictionOrder,
    ) -> None:
        self._structure = structure
        self._residency = residency
        self._locks = locks
        self._doomed = doomed
        self._order = order
        self._next_id = 1
        self.by_id: dict[int, Transfer] = {}

    # -- beginning --------------------------------------------------------------------------------

    def missing(self, node: Node) -> list[Node]:
        """Nodes from the adapter down to ``node`` that have no device slots."""
        nodes = []
        while node is not self._structure.root:
            if not node.resident:
                nodes.append(node)
            node = node.parent  # type: ignore[assignment]  # only the root has none
        nodes.reverse()
        return nodes

    def begin_load(self, node: Node) -> Transfer:
        """Host to device: what is missing on the way to ``node``."""
        self._structure.require_present(node)
        nodes = self.missing(node)
        if not nodes or not all(one.clean and not one.doomed for one in nodes):
            raise InvariantError(f"{node!r} cannot be loaded: not all of its path is complete on the host")
        for one in nodes:
            self._residency.enter_device(one, None, in_flight=True)
        return self._begin("load", nodes, node)

    def begin_save(self, node: Node) -> Transfer:
        """Device to host: what has no host slots on the way to ``node``."""
        self._structure.require_present(node)
        nodes: list[Node] = []
        walker = node
        while walker.kind == "kv" and not walker.host:
            nodes.append(walker)
            assert walker.parent is not None
            walker = walker.parent
        nodes.reverse()
        if not nodes or not walker.clean or any(one.transfer is not None for one in nodes):
            raise InvariantError(f"{node!r} cannot be saved: what is above it is not complete on the host")
        for one in nodes:
            self._residency.enter_host(one, None, in_flight=True)
        return self._begin("save", nodes, node)

    def begin_save_of_victim(self, node: Node) -> Transfer:
        """Device to host, of a node that has just given up its device slots: nothing is locked."""
        self._residency.enter_host(node, None, in_flight=True)
        return self._begin("save", [node], None)

    def begin_read(self, adapter: Node) -> Transfer:
        """File to host."""
        self._structure.require_adapter(adapter)
        if adapter.host or adapter.transfer is not None:
            raise InvariantError(f"{adapter!r} has host slots, or a copy is in flight")
        self._residency.enter_host(adapter, None, in_flight=True)
        return self._begin("read", [adapter], adapter)

    def _begin(
        self, kind: Literal["load", "save", "read"], nodes: Sequence[Node], anchor: Node | None
    ) -> Transfer:
        transfer = Transfer(self._next_id, kind, list(nodes), anchor, self._residency.arrivals)
        self._next_id += 1
        self.by_id[transfer.id] = transfer
        for node in nodes:
            node.transfer = transfer.id
        if anchor is not None:
            self._locks.lock(anchor)
        return transfer

    # -- ending -----------------------------------------------------------------------------------

    def end(self, id: int, ok: bool) -> Ended:
        """The copy is complete, or its nodes lose what they had gained."""
        transfer = self.by_id[id]
        nodes, above = transfer.nodes, transfer.nodes[0].parent
        if not ok and transfer.kind == "load" and self.in_use(id):
            raise InvariantError(f"I4: the load of {nodes[-1]!r} failed after its slots came into use")
        del self.by_id[id]
        for node in nodes:
            node.transfer = None
        if transfer.anchor is not None:
            self._locks.unlock(transfer.anchor)
        ended = Ended([], []) if ok else self._undo(transfer)
        assert above is not None  # a transfer never starts at the root
        for node in (*reversed(nodes), above):
            self._let_go(node)
        self._order.compact()
        return ended

    def _undo(self, transfer: Transfer) -> Ended:
        ended = Ended([], [])
        for node in reversed(transfer.nodes):
            if node.parent is None:
                continue  # of a doomed branch, taken down when the lock went
            if transfer.kind == "load":
                payload = self._residency.give_up_device(node, self._locks_of_saves(node))
                ended.victims.append(Victim(node.id, node.kind, node.key, payload, node.size, "demoted"))
            else:
                ended.host_victims.extend(self._lose_host_copies(node))
        return ended

    def _lose_host_copies(self, top: Node) -> list[HostVictim]:
        victims = []
        for node in reversed(list(self._structure.walk(top))):
            if node.host:
                if node.transfer is not None:
                    raise InvariantError(f"I4: {node!r} is in flight below a copy that failed")
                victims.append(self._residency.give_up_host(node))
        return victims

    def _let_go(self, node: Node) -> None:
        """A copy that held ``node``, or came from below it, has ended."""
        if node.parent is None:
            return
        if node.adapter is not None and node.adapter.doomed:
            self._doomed.reap(node)
        else:
            self._order.offer(node)
            self._order.reprioritize(node)  # what became clean is cheaper to lose

    # -- a load that must not fail any more -------------------------------------------------------

    def in_use(self, id: int) -> bool:
        """Whether others have locked, or built on, what load ``id`` brings: it must not fail any more."""
        load = self.by_id[id]
        return any(self._is_used(node, load) for node in load.nodes)

    def _is_used(self, node: Node, load: Transfer) -> bool:
        # A child that was there before the load is KV that outlived its adapter: it does not build on it.
        return node.locks - self._locks_of_saves(node) > 1 or any(
            child.resident and child.arrival > load.begun for child in node.children.values()
        )

    def _locks_of_saves(self, node: Node) -> int:
        """How many locks of an adapter are those of saves of KV that outlived it; 0 for all other nodes.

        A save below an adapter in flight began before the load did, and reads nothing of the adapter's own.
        """
        if not self._order.independent or node.kind != "adapter":
            return 0
        anchors = (t.anchor for t in self.by_id.values() if t.kind == "save" and t.anchor is not None)
        return sum(anchor.adapter is node for anchor in anchors)

    # -- the rest ---------------------------------------------------------------------------------

    def split(self, upper: Node, lower: Node) -> None:
        """A copy that brings ``lower`` brings ``upper``, which took its first tokens."""
        if lower.transfer is not None:
            nodes = self.by_id[lower.transfer].nodes
            nodes.insert(nodes.index(lower), upper)

    def clear(self) -> None:
        """The tree was emptied: nothing is in flight any more."""
        self.by_id = {}
