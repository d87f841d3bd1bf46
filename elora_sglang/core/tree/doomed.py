"""Branches that were unloaded, and what they gave up that nobody has collected yet."""

from __future__ import annotations

from elora_sglang.core.tree.node import HostVictim, Node, Victim
from elora_sglang.core.tree.order import EvictionOrder
from elora_sglang.core.tree.residency import Residency
from elora_sglang.core.tree.structure import Structure


class DoomedBranches:
    """Takes doomed branches down as locks and copies let go of them.

    Attributes:
        victims, host_victims: given up, and not collected.
        size: device slots of ``victims``; they count as evictable.
    """

    def __init__(self, structure: Structure, residency: Residency, order: EvictionOrder) -> None:
        self._structure = structure
        self._residency = residency
        self._order = order
        self.clear()

    def clear(self) -> None:
        """The tree was emptied."""
        self.victims: list[Victim] = []
        self.host_victims: list[HostVictim] = []
        self.size: int = 0

    def doom(self, adapter: Node) -> tuple[list[Victim], list[HostVictim]]:
        """Unload: everything that nothing holds leaves now and is returned, the rest in :meth:`reap`."""
        before, host_before = len(self.victims), len(self.host_victims)
        self._structure.unlist(adapter)
        for node in reversed(list(self._structure.walk(adapter))):
            self.reap(node)
        self._order.compact()
        victims, self.victims = self.victims[before:], self.victims[:before]
        host_victims, self.host_victims = self.host_victims[host_before:], self.host_victims[:host_before]
        self.size -= sum(victim.size for victim in victims)
        return victims, host_victims

    def reap(self, node: Node) -> None:
        """Take out of a doomed branch what nothing holds any more, from ``node`` upwards."""
        while node.doomed or node.kind == "kv":
            parent = node.parent
            if parent is None or node.locks:
                return
            if node.children or node.transfer is not None:
                self._order.offer(node)  # a copy below it may take a while; its device slots need not wait
                return
            victim, host_victim = self._residency.remove(node)
            if victim is not None:
                self.victims.append(victim)
                self.size += victim.size
            if host_victim is not None:
                self.host_victims.append(host_victim)
            node = parent

    def collect(self) -> list[Victim]:
        """What was given up on the device since the last call."""
        victims, self.victims, self.size = self.victims, [], 0
        return victims

    def collect_host(self) -> list[HostVictim]:
        """What was given up on the host since the last call."""
        victims, self.host_victims = self.host_victims, []
        return victims
