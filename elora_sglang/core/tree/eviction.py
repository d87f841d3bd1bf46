"""Takes the least valuable candidates off a tier. Has no state of its own."""

from __future__ import annotations

from collections.abc import Callable

from elora_sglang.core.tree.doomed import DoomedBranches
from elora_sglang.core.tree.node import Fate, HostVictim, Kind, Node, Victim
from elora_sglang.core.tree.order import EvictionOrder
from elora_sglang.core.tree.residency import Residency
from elora_sglang.core.tree.transfers import Transfers


def never(node: Node) -> bool:
    """The default answer to "shall this dirty victim be saved?"."""
    return False


class Eviction:
    """What doomed branches gave up goes first, then candidates in the policy's order."""

    def __init__(
        self, residency: Residency, order: EvictionOrder, doomed: DoomedBranches, transfers: Transfers
    ) -> None:
        self._residency = residency
        self._order = order
        self._doomed = doomed
        self._transfers = transfers

    def from_device(self, need: int, kind: Kind, save: Callable[[Node], bool]) -> list[Victim]:
        """Free at least ``need`` device slots, or all that can be freed."""
        freed = self._doomed.size
        victims = self._doomed.collect()
        while freed < need:
            candidates = self._order.choose(kind, self._residency.adapter_size)
            node = None if candidates is None else candidates.pop()
            if node is None:
                break
            freed += node.size
            victims.append(self._evict(node, save))
        self._order.compact()
        return victims

    def next_victim(self, kind: Kind) -> Node | None:
        """The node that :meth:`from_device` would take first, if any."""
        candidates = self._order.choose(kind, self._residency.adapter_size)
        return None if candidates is None else candidates.peek()

    def _evict(self, node: Node, save: Callable[[Node], bool]) -> Victim:
        parent = node.parent
        assert parent is not None
        payload = self._residency.give_up_device(node)
        fate: Fate = "demoted" if node.host else "dropped"
        transfer = None
        if not node.host:
            if node.kind == "kv" and parent.clean and save(node):
                fate, transfer = "saved", self._transfers.begin_save_of_victim(node).id
            else:
                self._residency.drop(node)
        return Victim(node.id, node.kind, node.key, payload, node.size, fate, transfer)

    def from_host(self, need: int) -> list[HostVictim]:
        """Free at least ``need`` host slots, or all that can be freed."""
        victims = self._doomed.collect_host()
        freed = sum(victim.size for victim in victims)
        while freed < need:
            node = self._order.host.pop()
            if node is None:
                break
            freed += node.size
            victims.append(self._residency.give_up_host(node))
        self._order.compact()
        return victims
