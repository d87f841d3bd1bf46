"""A LoRA pool without a model: adapters of given sizes whose bytes are one number, or no bytes at all.

The only stand-in for :class:`~elora_sglang.runtime.lora_pool.LoRAPool`. Whoever measures what deciding and booking
cost leaves out the bytes; tests put them into real pools, so that a slot that holds somebody else's bytes shows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, KeysView
from typing import TYPE_CHECKING

from elora_sglang.runtime.adapters.files import AdapterError

if TYPE_CHECKING:
    import torch

    from elora_sglang.runtime.lora_pool import HostAdapters, LoRAPool
    from elora_sglang.runtime.pool.views import UnifiedPool


class StandInStore:
    """The host side of a :class:`StandInPool`. A read from a file has ended when it is asked for next.

    Attributes:
        host: the host pool that was bound.
        slots: host slots of every adapter with a host copy, ascending.
        broken: adapters whose files cannot be read.
    """

    def __init__(self, weights: StandInPool) -> None:
        self.host: UnifiedPool | None = None
        self.slots: dict[str, torch.Tensor] = {}
        self.broken: set[str] = set()
        self._weights = weights
        self._placed: set[str] = set()
        self._ended: list[tuple[str, AdapterError | None]] = []

    def bind(self, host: UnifiedPool) -> None:
        """Host copies lie in ``host``."""
        self.host = host

    def in_memory(self) -> list[str]:
        """Adapters that nobody has placed yet."""
        return [lora_id for lora_id in self._weights.sizes if lora_id not in self._placed]

    def drop_cpu_tensors(self, lora_id: str) -> bool:
        """Their bytes can always be made again."""
        self._placed.add(lora_id)
        return True

    def read_into_host(self, lora_id: str, host_slots: torch.Tensor) -> None:
        """At once. Raises AdapterError for one of :attr:`broken`."""
        self._placed.add(lora_id)
        if (error := self.fault(lora_id)) is not None:
            raise error
        self._write(lora_id, host_slots)

    def start_read(self, lora_id: str, host_slots: torch.Tensor) -> None:
        """Ends at once, too, but is only told by the next :meth:`poll_reads`."""
        error = self.fault(lora_id)
        if error is None:
            self._write(lora_id, host_slots)
        self._ended.append((lora_id, error))

    def _write(self, lora_id: str, host_slots: torch.Tensor) -> None:
        if lora_id in self.slots:
            raise ValueError(f"{lora_id} has a host copy already")
        if self._weights.has_bytes:
            assert self.host is not None  # bound by whoever has host slots
            self._weights.write(self.host, lora_id, host_slots)
        self.slots[lora_id] = host_slots

    def poll_reads(self, *, wait: bool = False) -> list[tuple[str, AdapterError | None]]:
        """Reads that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def drop_host(self, lora_id: str) -> None:
        """Forget the host copy."""
        self.slots.pop(lora_id, None)

    def drop_all(self) -> None:
        """Forget all host copies."""
        self.slots.clear()

    def host_bytes(self, lora_id: str) -> torch.Tensor:
        """What its host slots hold now."""
        assert self.host is not None
        return bytes_in(self.host, self.slots[lora_id])

    def fault(self, lora_id: str) -> AdapterError | None:
        """Why its file cannot be read; None if it can."""
        return AdapterError(lora_id, "is gone", "Put it back.") if lora_id in self.broken else None


class StandInPool:
    """Adapters of ``sizes`` slots.

    Args:
        sizes: slots by adapter id; the adapters that are loaded at the start.
        pool: the KV pool, into whose rows adapter k writes the byte k + 1; None: adapters have slots and no bytes.
        pinned: adapters that must stay resident once they are.

    Attributes:
        sizes: slots by id of the loaded adapters; changed by whoever loads and unloads.
        resident: device slots of every resident adapter; ascending where there are bytes.
    """

    on_cuda = False

    def __init__(
        self, sizes: dict[str, int], pool: UnifiedPool | None = None, pinned: Collection[str] = ()
    ) -> None:
        self.sizes = dict(sizes)
        self.pinned = set(pinned)
        self.resident: dict[str, torch.Tensor] = {}
        self.store = StandInStore(self)
        self.layer_fence: Callable[[int], None] | None = None
        self._pool = pool
        self._numbers: dict[str, int] = {}

    @property
    def has_bytes(self) -> bool:
        """Whether adapters have bytes in the pools."""
        return self._pool is not None

    @property
    def pool(self) -> UnifiedPool:
        """The KV pool. Raises RuntimeError without one."""
        if self._pool is None:
            raise RuntimeError("this stand-in has no bytes, and no pool that they could be in")
        return self._pool

    def byte(self, lora_id: str) -> int:
        """What every byte of the adapter is, on both tiers."""
        return self._numbers.setdefault(lora_id, len(self._numbers) % 255 + 1)

    def write(self, pool: UnifiedPool, lora_id: str, slots: torch.Tensor) -> None:
        """Fill these slots of a pool with the adapter's bytes."""
        for layer in range(pool.num_layers):
            for stream in (0, 1):
                pool.byte_rows(layer, stream)[slots] = self.byte(lora_id)

    def loaded(self) -> KeysView[str]:
        """All of them."""
        return self.sizes.keys()

    def is_loaded(self, lora_id: str) -> bool:
        """Whether it is one of them."""
        return lora_id in self.sizes

    def is_pinned(self, lora_id: str) -> bool:
        """Whether it must stay resident once it is."""
        return lora_id in self.pinned

    def slots_needed(self, lora_id: str) -> int:
        """Its size."""
        return self.sizes[lora_id]

    def pinned_slots(self, *, excluding: str | None = None) -> int:
        """Slots of all pinned adapters but one."""
        return sum(self.sizes[lora_id] for lora_id in self.pinned if lora_id != excluding)

    def load(self, lora_id: str, slots: torch.Tensor) -> None:
        """From its file. Raises AdapterError for a broken one, ValueError for a resident one."""
        if (error := self.store.fault(lora_id)) is not None:
            raise error
        self.adopt(lora_id, slots)
        if self.has_bytes:
            self.write(self.pool, lora_id, slots)

    def adopt(self, lora_id: str, slots: torch.Tensor) -> None:
        """A transfer brings its bytes. Raises ValueError for a resident one."""
        if lora_id in self.resident:
            raise ValueError(f"adapter {lora_id} is already resident")
        self.resident[lora_id] = slots.sort().values if self.has_bytes else slots

    def drop(self, lora_id: str) -> None:
        """It is not resident any more."""
        self.resident.pop(lora_id, None)

    def drop_all(self) -> None:
        """None is resident any more."""
        self.resident.clear()

    def read_bytes(self, lora_id: str) -> torch.Tensor:
        """What its device slots hold now."""
        return bytes_in(self.pool, self.resident[lora_id])

    def expected_bytes(self, lora_id: str, *, from_files: bool = False) -> torch.Tensor:
        """What they must hold."""
        import torch

        size = self.sizes[lora_id] * self.pool.num_layers * sum(self.pool.row_bytes)
        return torch.full((size,), self.byte(lora_id), dtype=torch.uint8)


def bytes_in(pool: UnifiedPool, slots: torch.Tensor) -> torch.Tensor:
    """All bytes in these slots of a pool, layer by layer: uint8."""
    import torch

    rows = [pool.byte_rows(layer, s)[slots].flatten() for layer in range(pool.num_layers) for s in (0, 1)]
    return torch.cat(rows)


if TYPE_CHECKING:
    # mypy compares every signature with the Protocol's here.
    _pool: LoRAPool = StandInPool({})
    _store: HostAdapters = StandInPool({}).store
