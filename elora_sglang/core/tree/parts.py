"""The parts of a tree, put together."""

from __future__ import annotations

from dataclasses import dataclass

from elora_sglang.core.tree.access import Access
from elora_sglang.core.tree.doomed import DoomedBranches
from elora_sglang.core.tree.eviction import Eviction
from elora_sglang.core.tree.guards import Guards
from elora_sglang.core.tree.locks import Locks
from elora_sglang.core.tree.order import EvictionOrder
from elora_sglang.core.tree.payloads import PayloadOps
from elora_sglang.core.tree.ranking import Ranking
from elora_sglang.core.tree.residency import Residency
from elora_sglang.core.tree.structure import Structure
from elora_sglang.core.tree.transfers import Transfers


@dataclass(frozen=True, slots=True)
class Parts:
    """One of each. A part is given the ones that it calls, which are all above it in this list."""

    ranking: Ranking
    structure: Structure
    order: EvictionOrder
    residency: Residency
    doomed: DoomedBranches
    locks: Locks
    guards: Guards
    transfers: Transfers
    eviction: Eviction
    access: Access

    @classmethod
    def build(cls, page_size: int, ranking: Ranking, payloads: PayloadOps) -> Parts:
        """The parts of an empty tree."""
        structure = Structure(page_size)
        order = EvictionOrder(structure, ranking)
        residency = Residency(structure, ranking, payloads, order)
        doomed = DoomedBranches(structure, residency, order)
        locks = Locks(structure, residency, order, doomed)
        guards = Guards(structure, order)
        transfers = Transfers(structure, residency, locks, doomed, order)
        eviction = Eviction(residency, order, doomed, transfers)
        access = Access(structure, residency, guards, transfers, ranking, payloads)
        return cls(ranking, structure, order, residency, doomed, locks, guards, transfers, eviction, access)

    def clear(self) -> None:
        """Forget everything but the base model's node."""
        self.order.clear()
        self.structure.clear()
        self.residency.clear()
        self.doomed.clear()
        self.locks.clear()
        self.guards.clear()
        self.transfers.clear()
        self.ranking.on_reset()
