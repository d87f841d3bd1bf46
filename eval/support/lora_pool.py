"""A LoRA pool without a model and without bytes: adapters of given sizes that lie in slots.

A stand-in for :class:`~elora_sglang.runtime.lora_pool.LoRAPool`, for whoever measures what deciding and booking cost.
The tests' own adds bytes, so that a slot that holds somebody else's shows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, KeysView
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from elora_sglang.runtime.adapters.files import AdapterError
    from elora_sglang.runtime.lora_pool import HostAdapters, LoRAPool
    from elora_sglang.runtime.pool.views import UnifiedPool

_NO_BYTES = "this stand-in has no bytes, and no pool that they could be in"


class StandInStore:
    """The host side of a :class:`StandInPool`. A read from a file has ended when it is asked for next.

    Attributes:
        slots: host slots of every adapter with a host copy, ascending.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.slots: dict[str, torch.Tensor] = {}
        self._sizes = sizes
        self._placed: set[str] = set()
        self._ended: list[tuple[str, AdapterError | None]] = []

    def bind(self, host: UnifiedPool) -> None:
        """There are no bytes that could lie in it."""

    def in_memory(self) -> list[str]:
        """Adapters that nobody has placed yet."""
        return [lora_id for lora_id in self._sizes if lora_id not in self._placed]

    def drop_cpu_tensors(self, lora_id: str) -> bool:
        """Their bytes can always be made again."""
        self._placed.add(lora_id)
        return True

    def read_into_host(self, lora_id: str, host_slots: torch.Tensor) -> None:
        """At once. Raises ValueError where it has a host copy."""
        self._placed.add(lora_id)
        self._write(lora_id, host_slots)

    def start_read(self, lora_id: str, host_slots: torch.Tensor) -> None:
        """Ends at once, too, but is only told by the next :meth:`poll_reads`."""
        self._write(lora_id, host_slots)
        self._ended.append((lora_id, None))

    def _write(self, lora_id: str, host_slots: torch.Tensor) -> None:
        if lora_id in self.slots:
            raise ValueError(f"{lora_id} has a host copy already")
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
        """Raises RuntimeError."""
        raise RuntimeError(_NO_BYTES)


class StandInPool:
    """Adapters of ``sizes`` slots, by adapter id: those that are loaded at the start.

    Attributes:
        sizes: slots by id of the loaded adapters; changed by whoever loads and unloads.
        pinned: adapters that must stay resident once they are.
        resident: device slots of every resident adapter.
    """

    on_cuda = False

    def __init__(self, sizes: dict[str, int], pinned: Collection[str] = ()) -> None:
        self.sizes, self.pinned = dict(sizes), set(pinned)
        self.resident: dict[str, torch.Tensor] = {}
        self.store = StandInStore(self.sizes)
        self.layer_fence: Callable[[int], None] | None = None

    @property
    def pool(self) -> UnifiedPool:
        """Raises RuntimeError."""
        raise RuntimeError(_NO_BYTES)

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
        """From its file. Raises ValueError for a resident one."""
        self.adopt(lora_id, slots)

    def adopt(self, lora_id: str, slots: torch.Tensor) -> None:
        """A transfer brings it. Raises ValueError for a resident one."""
        if lora_id in self.resident:
            raise ValueError(f"adapter {lora_id} is already resident")
        self.resident[lora_id] = slots

    def drop(self, lora_id: str) -> None:
        """It is not resident any more."""
        self.resident.pop(lora_id, None)

    def drop_all(self) -> None:
        """None is resident any more."""
        self.resident.clear()

    def read_bytes(self, lora_id: str) -> torch.Tensor:
        """Raises RuntimeError."""
        raise RuntimeError(_NO_BYTES)

    def expected_bytes(self, lora_id: str, *, from_files: bool = False) -> torch.Tensor:
        """Raises RuntimeError."""
        raise RuntimeError(_NO_BYTES)


if TYPE_CHECKING:
    # mypy compares every signature with the Protocol's here.
    _pool: LoRAPool = StandInPool({})
    _store: HostAdapters = StandInPool({}).store
