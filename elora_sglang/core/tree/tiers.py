"""Movements between the tiers: eviction, and copies that are in flight for a while."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from elora_sglang.core.errors import InvariantError
from elora_sglang.core.tree.candidates import Candidates
from elora_sglang.core.tree.node import Fate, HostVictim, Kind, Node, Transfer, Victim
from elora_sglang.core.tree.residency import ResidentTree


def never(node: Node) -> bool:
    """The default answer to "shall this dirty victim be saved?"."""
    return False


class Ended(NamedTuple):
    """What the end of a transfer freed; both lists are empty when it succeeded."""

    victims: list[Victim]
    host_victims: list[HostVictim]


class TieredTree(ResidentTree):
    """Evicts from either tier and keeps the books of transfers; moves no bytes itself."""

    _next_transfer = 1

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
        freed = self._orphan_size
        victims = self.collect_doomed()
        while freed < need:
            node = self._next_victim(kind)
            if node is None:
                break
            freed += node.size
            victims.append(self._evict_one(node, save))
        self._compact()
        return victims

    def peek_victim(self, kind: Kind = "kv") -> Node | None:
        """The node that :meth:`evict` would take first, if any; changes nothing but outdated entries."""
        found = self._choose(kind)
        return None if found is None else found.peek()

    def _next_victim(self, kind: Kind) -> Node | None:
        found = self._choose(kind)
        return None if found is None else found.pop()

    def _choose(self, kind: Kind) -> Candidates | None:
        kv, adapter = self._kv_candidates.peek(), self._adapter_candidates.peek()
        if kv is None or adapter is None:
            if kv is None and adapter is None:
                return None
            return self._adapter_candidates if kv is None else self._kv_candidates
        side = None if kv.guard or adapter.guard else self.policy.side(kind, self.adapter_size)
        if side is not None:
            return self._kv_candidates if side == "kv" else self._adapter_candidates
        assert kv.queued is not None and adapter.queued is not None
        kv_first = (kv.queued, kv.id) < (adapter.queued, adapter.id)
        return self._kv_candidates if kv_first else self._adapter_candidates

    def _evict_one(self, node: Node, save: Callable[[Node], bool]) -> Victim:
        parent = node.parent
        assert parent is not None
        payload = self._leave_device(node)
        fate: Fate = "demoted" if node.host else "dropped"
        transfer = None
        if not node.host:
            if node.kind == "kv" and parent.clean and save(node):
                self._enter_host(node)
                fate, transfer = "saved", self._start("save", [node], None).id
            else:
                self.policy.on_drop(node)
                if node.kind == "kv":
                    self._detach(node)
        self._offer(parent)
        self._offer(node)
        return Victim(node.id, node.kind, node.key, payload, node.size, fate, transfer)

    def evict_host(self, need: int) -> list[HostVictim]:
        """Free at least ``need`` host slots, or all that can be freed; the caller frees the victims' slots.

        Takes host leaves that no lock and no copy in flight holds, in the policy's order. A victim that has
        device slots becomes dirty, another one is gone: KV leaves the tree, an adapter has only its file.
        """
        freed = sum(victim.size for victim in self._host_orphans)
        victims = self.collect_doomed_host()
        while freed < need:
            node = self._host_candidates.pop()
            if node is None:
                break
            freed += node.size
            parent = node.parent
            assert parent is not None
            victims.append(self._drop_host_copy(node))
            self._offer(parent)
        self._compact()
        return victims

    def peek_host_victim(self) -> Node | None:
        """The node that :meth:`evict_host` would take first, if any."""
        return self._host_candidates.peek()

    def _drop_host_copy(self, node: Node) -> HostVictim:
        payload, gone = self._leave_host(node), not node.resident
        if gone:
            self.policy.on_drop(node)
            if node.kind == "kv":
                self._detach(node)
        return HostVictim(node.id, node.kind, node.key, payload, node.size, gone)

    def collect_doomed(self) -> list[Victim]:
        """What doomed branches gave up on the device since the last call; the caller frees the slots."""
        victims, self._orphans = self._orphans, []
        self.evictable_size -= self._orphan_size
        self._orphan_size = 0
        return victims

    def collect_doomed_host(self) -> list[HostVictim]:
        """What doomed branches gave up on the host since the last call; the caller frees the slots."""
        victims, self._host_orphans = self._host_orphans, []
        return victims

    # -- transfers --------------------------------------------------------------------------------

    def missing(self, node: Node) -> list[Node]:
        """The nodes on the way from the adapter to ``node`` that have no device slots, adapter first."""
        nodes = []
        while node is not self.root:
            if not node.resident:
                nodes.append(node)
            node = node.parent  # type: ignore[assignment]  # only the root has none
        nodes.reverse()
        return nodes

    def begin_load(self, node: Node) -> Transfer:
        """Host to device: everything :meth:`missing` on the way to ``node`` becomes resident at once.

        The nodes are locked until :meth:`end_transfer`. The caller allocates slots for each and names them
        with :meth:`set_payload`, or ends the transfer as failed.

        Raises:
            InvariantError: nothing is missing, or a missing node has no complete host copy.
        """
        self._require_present(node)
        nodes = self.missing(node)
        if not nodes or not all(one.clean and not one.doomed for one in nodes):
            raise InvariantError(f"{node!r} cannot be loaded: not all of its path is complete on the host")
        outlived = {child.id for child in nodes[0].children.values() if child.resident}
        for one in nodes:
            self._enter_device(one, None)
        transfer = self._start("load", nodes, node)
        transfer.outlived = outlived
        return transfer

    def begin_save(self, node: Node) -> Transfer:
        """Device to host: everything on the way to ``node`` without host slots gets some; parents first.

        The nodes are locked until :meth:`end_transfer`. The caller allocates host slots for each and names
        them with :meth:`set_host_payload`, or ends the transfer as failed.

        Raises:
            InvariantError: the adapter or another node on the way is not complete on the host, a node is
                still being loaded, or all are there already.
        """
        self._require_present(node)
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
            self._enter_host(one)
        return self._start("save", nodes, node)

    def begin_read(self, adapter: Node) -> Transfer:
        """File to host: the adapter gets host slots, named with :meth:`set_host_payload`; locked till the end.

        Raises:
            InvariantError: not an adapter, or it has host slots.
        """
        self._require_adapter(adapter)
        if adapter.host or adapter.transfer is not None:
            raise InvariantError(f"{adapter!r} has host slots, or a copy is in flight")
        self._enter_host(adapter)
        return self._start("read", [adapter], adapter)

    def place_on_host(self, adapter: Node, payload: Any) -> None:
        """An adapter was written into host slots before the tree was told: it is complete there from now on."""
        self._require_adapter(adapter)
        if adapter.host:
            raise InvariantError(f"{adapter!r} has host slots")
        self._enter_host(adapter)
        adapter.host_payload = payload
        self._offer(adapter)

    def set_payload(self, node: Node, payload: Any) -> None:
        """Name the device slots of a node that is being loaded."""
        if not node.resident or node.payload is not None:
            raise InvariantError(f"{node!r} waits for no device slots")
        node.payload = payload

    def set_host_payload(self, node: Node, payload: Any) -> None:
        """Name the host slots of a node that is being saved or read."""
        if not node.host or node.host_payload is not None:
            raise InvariantError(f"{node!r} waits for no host slots")
        node.host_payload = payload

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
        transfer = self.transfers[id]
        nodes = transfer.nodes
        if not ok and transfer.kind == "load" and self.in_use(id):
            raise InvariantError(f"I4: the load of {nodes[-1]!r} failed after its slots came into use")
        del self.transfers[id]
        above = nodes[0].parent
        for node in nodes:
            node.transfer = None
        if transfer.anchor is not None:
            self.unlock(transfer.anchor)
        victims: list[Victim] = []
        host_victims: list[HostVictim] = []
        if not ok:
            for node in reversed(nodes):
                if node.parent is None:
                    continue
                if transfer.kind == "load":
                    victims.append(self._evict_one(node, never))
                else:
                    host_victims += self._lose_host_copies(node)
        assert above is not None  # a transfer never starts at the root
        for node in (*reversed(nodes), above):
            if node.parent is None:
                continue
            if self.is_doomed(node):
                self._reap(node)
            else:
                self._offer(node)
                self.reprioritize(node)  # what became clean is cheaper to lose
        self._compact()
        return Ended(victims, host_victims)

    def in_use(self, id: int) -> bool:
        """Whether others have locked, or built on, what a load in flight brings: it must not fail any more."""
        transfer = self.transfers[id]
        return any(self._is_used(node, transfer) for node in transfer.nodes)

    def _is_used(self, node: Node, load: Transfer) -> bool:
        # A save below an adapter in flight began before it: it copies KV that outlived the adapter.
        locks = node.locks - (self._saves_below(node) if self._independent and node.kind == "adapter" else 0)
        return locks > 1 or any(
            child.resident and child.transfer != load.id and child.id not in load.outlived
            for child in node.children.values()
        )

    def _lose_host_copies(self, top: Node) -> list[HostVictim]:
        victims = []
        for node in reversed(list(self.walk(top))):
            if node.host:
                if node.transfer is not None:
                    raise InvariantError(f"I4: {node!r} is in flight below a copy that failed")
                victims.append(self._drop_host_copy(node))
        return victims

    def _start(
        self, kind: Literal["load", "save", "read"], nodes: Sequence[Node], anchor: Node | None
    ) -> Transfer:
        transfer = Transfer(self._next_transfer, kind, list(nodes), anchor)
        self._next_transfer += 1
        self.transfers[transfer.id] = transfer
        for node in nodes:
            node.transfer = transfer.id
        if anchor is not None:
            self.lock(anchor)
        return transfer
