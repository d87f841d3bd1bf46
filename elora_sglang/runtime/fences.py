"""Which loads in flight the next batch has to wait for."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from elora_sglang.core.tree.node import Node

if TYPE_CHECKING:
    from elora_sglang.runtime.transfers.engine import TransferEngine


class BatchFences:
    """Gathers loads while a batch is formed, and fences them in the transfer engine, layer by layer.

    Args:
        engine: copies between the tiers; ``None`` without a host tier, then nothing is ever fenced.
        loading: transfers to the device that are in flight, kept up to date by their owner.
    """

    def __init__(self, engine: TransferEngine | None, loading: Collection[int]) -> None:
        self._engine, self._loading = engine, loading
        #: Loads that the batch uses which is being formed.
        self._fenced: set[int] = set()
        #: Loads that rows of running requests were repointed to since the last batch.
        self._repointed: set[int] = set()

    def begin(self) -> None:
        """A batch begins to be formed; it is fenced by itself."""
        if self._engine is None or self._engine.consumer_index < 0:
            self._repointed.clear()  # a batch has waited for them
        self._fenced = set(self._repointed)

    def use(self, node: Node) -> None:
        """The batch being formed reads ``node`` and all above it."""
        if self._engine is not None and self._loading:
            self._fence(self.above(node))

    def repoint(self, node: Node) -> None:
        """A running request reads ``node`` and all above it from its next batch on."""
        if self._engine is not None and self._loading:
            self._repointed.update(self.above(node))
            self._fence(self._repointed)

    def above(self, node: Node) -> list[int]:
        """Loads in flight that bring ``node`` or anything above it, in order of their start."""
        found = set()
        while node.parent is not None:
            if node.transfer is not None and node.transfer in self._loading:
                found.add(node.transfer)
            node = node.parent
        return sorted(found)

    def _fence(self, transfers: Collection[int]) -> None:
        assert self._engine is not None
        self._fenced.update(transfers)
        self._engine.fence(sorted(self._fenced))
