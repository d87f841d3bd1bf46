"""The stand-in for a LoRA pool with bytes: adapter k writes the byte k + 1 into real pools, on both tiers.

So a slot that holds somebody else's bytes shows. Files can be broken.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from elora_sglang.eval.support.lora_pool import StandInPool, StandInStore
from elora_sglang.runtime.adapters.files import AdapterError
from elora_sglang.runtime.pool.views import UnifiedPool


class FilledStore(StandInStore):
    """The host side of a :class:`FilledPool`.

    Attributes:
        host: the host pool that was bound.
        broken: adapters whose files cannot be read.
    """

    def __init__(self, weights: FilledPool) -> None:
        super().__init__(weights.sizes)
        self.host: UnifiedPool | None = None
        self.broken: set[str] = set()
        self._weights = weights

    def bind(self, host: UnifiedPool) -> None:
        """Host copies lie in ``host``."""
        self.host = host

    def read_into_host(self, lora_id: str, host_slots: torch.Tensor) -> None:
        """At once. Raises AdapterError for one of :attr:`broken`."""
        self._placed.add(lora_id)
        self.require(lora_id)
        self._write(lora_id, host_slots)

    def start_read(self, lora_id: str, host_slots: torch.Tensor) -> None:
        """Ends at once, too, but is only told by the next :meth:`poll_reads`."""
        try:
            self.require(lora_id)
        except AdapterError as error:
            self._ended.append((lora_id, error))
        else:
            super().start_read(lora_id, host_slots)

    def _write(self, lora_id: str, host_slots: torch.Tensor) -> None:
        super()._write(lora_id, host_slots)
        assert self.host is not None  # bound by whoever has host slots
        self._weights.write(self.host, lora_id, host_slots)

    def host_bytes(self, lora_id: str) -> torch.Tensor:
        """What its host slots hold now."""
        assert self.host is not None
        return bytes_in(self.host, self.slots[lora_id])

    def require(self, lora_id: str) -> None:
        """Raises AdapterError for one of :attr:`broken`."""
        if lora_id in self.broken:
            raise AdapterError(lora_id, "is gone", "Put it back.")


class FilledPool(StandInPool):
    """Adapters of ``sizes`` slots, whose bytes are in ``kv``, the KV pool."""

    store: FilledStore

    def __init__(self, sizes: dict[str, int], kv: UnifiedPool, pinned: Collection[str] = ()) -> None:
        super().__init__(sizes, pinned)
        self.store = FilledStore(self)
        self._kv = kv
        self._numbers: dict[str, int] = {}

    @property
    def pool(self) -> UnifiedPool:
        """The KV pool."""
        return self._kv

    def byte(self, lora_id: str) -> int:
        """What every byte of the adapter is, on both tiers."""
        return self._numbers.setdefault(lora_id, len(self._numbers) % 255 + 1)

    def write(self, pool: UnifiedPool, lora_id: str, slots: torch.Tensor) -> None:
        """Fill these slots of a pool with the adapter's bytes."""
        for layer in range(pool.num_layers):
            for stream in (0, 1):
                pool.byte_rows(layer, stream)[slots] = self.byte(lora_id)

    def load(self, lora_id: str, slots: torch.Tensor) -> None:
        """From its file. Raises AdapterError for a broken one, ValueError for a resident one."""
        self.store.require(lora_id)
        super().load(lora_id, slots)
        self.write(self.pool, lora_id, slots)

    def adopt(self, lora_id: str, slots: torch.Tensor) -> None:
        """A transfer brings its bytes. Raises ValueError for a resident one."""
        super().adopt(lora_id, slots.sort().values)

    def read_bytes(self, lora_id: str) -> torch.Tensor:
        """What its device slots hold now."""
        return bytes_in(self.pool, self.resident[lora_id])

    def expected_bytes(self, lora_id: str, *, from_files: bool = False) -> torch.Tensor:
        """What they must hold."""
        size = self.sizes[lora_id] * self.pool.num_layers * sum(self.pool.row_bytes)
        return torch.full((size,), self.byte(lora_id), dtype=torch.uint8)


def bytes_in(pool: UnifiedPool, slots: torch.Tensor) -> torch.Tensor:
    """All bytes in these slots of a pool, layer by layer: uint8."""
    rows = [pool.byte_rows(layer, s)[slots].flatten() for layer in range(pool.num_layers) for s in (0, 1)]
    return torch.cat(rows)
