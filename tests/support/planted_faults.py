"""Faults for the search of ``eval/interleavings`` to find: each is one that the core had, or could easily have."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from elora_sglang.core.tree.doomed import DoomedBranches
from elora_sglang.core.tree.guards import Guards
from elora_sglang.core.tree.locks import Locks
from elora_sglang.core.tree.node import Node, Transfer
from elora_sglang.core.tree.transfers import Transfers
from elora_sglang.eval.interleavings.memory import Memory

Plant = Callable[[pytest.MonkeyPatch], None]


def doomed_branch_is_not_offered(patch: pytest.MonkeyPatch) -> None:
    """As before commit 8a55e64: the last lock of an unloaded branch offers only what its reaping comes to."""

    unlock = Locks.unlock

    def deaf(self: Locks, node: Node) -> None:
        order = self._order
        if node.adapter is not None and node.adapter.doomed:
            silent: Any = SimpleNamespace(offer=lambda node: None, compact=order.compact)
            self._order = silent  # the reaping has its own, and offers what it comes to
        try:
            unlock(self, node)
        finally:
            self._order = order

    patch.setattr(Locks, "unlock", deaf)


def slots_go_before_the_save_has_read_them(patch: pytest.MonkeyPatch) -> None:
    """A save locks nothing, so what it reads may be evicted, and its slots given away."""
    begin = Transfers._begin

    def unlocked(self: Transfers, kind: Any, nodes: Any, anchor: Node | None) -> Transfer:
        return begin(self, kind, nodes, None if kind == "save" else anchor)

    patch.setattr(Transfers, "_begin", unlocked)


def unload_takes_what_a_copy_needs(patch: pytest.MonkeyPatch) -> None:
    """An unload is carried out at once, whatever copy is in flight; its locks are taken off."""
    doom = DoomedBranches.doom

    def hasty(self: DoomedBranches, adapter: Node) -> Any:
        for node in self._structure.walk(adapter):
            if node.transfer is not None:
                self._residency.protect(-node.size if node.locks and node.resident else 0)
                node.transfer, node.locks = None, 0
        return doom(self, adapter)

    patch.setattr(DoomedBranches, "doom", hasty)


def batch_overtakes_a_released_save(patch: pytest.MonkeyPatch) -> None:
    """A batch does not wait for the save of a victim before it writes the victim's slots."""

    def write(self: Memory, slots: Any, content: Any) -> None:
        self.bytes.update(zip(slots, content, strict=True))

    patch.setattr(Memory, "write", write)


def batch_has_no_fence(patch: pytest.MonkeyPatch) -> None:
    """A batch does not wait for the loads that it uses."""
    patch.setattr(Memory, "settle", lambda self, node: None)


def guards_stay(patch: pytest.MonkeyPatch) -> None:
    """Who waits no more still guards what it needed."""
    patch.setattr(Guards, "release", lambda self, rank: self._by_rank.pop(rank, None))


def failed_copy_keeps_its_lock(patch: pytest.MonkeyPatch) -> None:
    """Only copies that succeed give back their lock."""
    end = Transfers.end

    def forgetful(self: Transfers, id: int, ok: bool) -> Any:
        transfer = self.by_id[id]
        if not ok and transfer.kind != "load":
            transfer.anchor = None
        return end(self, id, ok)

    patch.setattr(Transfers, "end", forgetful)
