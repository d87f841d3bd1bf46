"""Where adapters' bytes are besides the device: one copy in the host pool, else the file.

An adapter's bytes have one *source* at a time:

``host``    slots of the host pool, packed once in the device's byte layout: loading is a copy of rows
``memory``  CPU tensors: SGLang's own (with ``--elora-host-memory 0``, always; else only until the adapter is placed),
            or, for an adapter that came as tensors in a request, a private copy while it has no host slots
``file``    its folder: read again on demand, and checked again to be the version that was loaded

An adapter that came as tensors has no file: its bytes never leave memory. When it loses its host slots,
:meth:`AdapterStore.drop_host` takes them into the private copy, so there is still one copy only.

How the cache uses it, all calls from the scheduler's thread::

    store.start_read(lora_id, host_slots)       # file or memory -> host, in the background
    for lora_id, error in store.poll_reads():   # every tick; error: free the slots, turn requests away
        ...
    host, device = store.host_slots(lora_id), device_slots.sort().values
    transfers.load(id, host, device)            # row i of one is row i of the other, both ascending
    weights.adopt(lora_id, device)              # resident; batches wait for layers by ``weights.layer_fence``

    store.drop_host(lora_id)                    # evicted from the host; slots are the caller's again

An adapter is never copied from the device to the host: what its file says is what was checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch

from elora_sglang.integration.weights.reader import BackgroundReader, as_result, has_file, read_version
from elora_sglang.runtime.adapters.files import AdapterError
from elora_sglang.runtime.lora_pool import AdapterSource, LoadedAdapters
from elora_sglang.runtime.pool.packing import LayerMatrices, PackedAdapter
from elora_sglang.runtime.pool.views import UnifiedPool

if TYPE_CHECKING:
    from sglang.srt.lora.lora import LoRAAdapter

Source = Literal["host", "memory", "file"]

#: CPU tensors of adapters with a file that may wait for a place in the host pool, in bytes. The adapter that
#: waits longest loses its own beyond that: how many adapters are registered costs no memory.
WAITING_BYTES = 1 << 28

_WAITING = "_elora_waiting"

#: What a read brings: the adapter in host slots, or its weights in CPU tensors.
_Read = tuple[PackedAdapter | None, "LoRAAdapter | None"]


class AdapterStore:
    """Host side of one LoRA pool, which makes it and gives layouts and matrices.

    Not thread-safe: only the reads that it starts itself run elsewhere, and touch nothing but their slots.
    """

    def __init__(self, weights: AdapterSource) -> None:
        self._weights = weights
        self._host: UnifiedPool | None = None
        self._packed: dict[str, PackedAdapter] = {}
        self._kept: dict[str, list[dict[tuple[str, int], torch.Tensor]]] = {}
        self._reader: BackgroundReader[_Read] = BackgroundReader()

    # -- the host pool --------------------------------------------------------------------------

    @property
    def host(self) -> UnifiedPool | None:
        """The host pool, None without one."""
        return self._host

    def bind(self, host: UnifiedPool | None) -> None:
        """Adapters live in ``host`` from now on; host copies in an earlier one are forgotten.

        From here on SGLang's CPU tensors are only a place to read from once: see :meth:`in_memory`.
        """
        self.drop_all()
        self._host = host

    def host_slots(self, lora_id: str) -> torch.Tensor:
        """Slots of the adapter's host copy, *ascending*: pair them with ascending device slots. KeyError: none."""
        return self._packed[lora_id].slots

    def copy_rows(self, lora_id: str, target: PackedAdapter) -> None:
        """Copy the host copy's rows into ``target``'s slots, at once. Mutates the target's pool."""
        assert self._host is not None  # it has a copy there
        rows, pool = self.host_slots(lora_id), target.pool
        for layer in range(pool.num_layers):
            for stream in (0, 1):
                words = self._host.word_rows(layer, stream)[rows].to(pool.device)
                pool.word_rows(layer, stream).index_copy_(0, target.slots, words)

    def drop_host(self, lora_id: str) -> None:
        """Forget the host copy; its slots are the caller's again when this returns. Idempotent.

        An adapter without a file keeps its bytes in memory of its own.
        """
        packed = self._packed.pop(lora_id, None)
        if packed is not None and lora_id in self._weights.lora_manager.loras and not self.has_file(lora_id):
            self._kept[lora_id] = packed.read()

    def drop_all(self) -> None:
        """Forget all host copies, as after a flush; waits for reads in flight, whose slots are free then, too."""
        self._reader.done(wait=True)
        for lora_id in list(self._packed):
            self.drop_host(lora_id)

    def forget(self, lora_id: str) -> None:
        """The adapter was unloaded: as :meth:`drop_host`, and nothing stays. Idempotent.

        A read in flight still comes out of :meth:`poll_reads`, with an error; its slots stay in use until then.
        """
        self._packed.pop(lora_id, None)
        self._kept.pop(lora_id, None)

    def host_bytes(self, lora_id: str) -> torch.Tensor:
        """The host copy's weights as they are now, in the form of ``EloraLoRAMemoryPool.read_bytes``."""
        return joined(self._packed[lora_id].read())

    # -- where the bytes are --------------------------------------------------------------------

    def source(self, lora_id: str) -> Source:
        """Where the bytes of a loaded adapter come from now."""
        if lora_id in self._packed:
            return "host"
        return "memory" if lora_id in self._kept or self._has_tensors(lora_id) else "file"

    def has_file(self, lora_id: str) -> bool:
        """Whether the adapter came from a folder, so that its bytes may leave memory."""
        return has_file(self._weights.lora_manager.lora_refs[lora_id])

    def in_memory(self) -> list[str]:
        """Adapters whose CPU tensors wait to be placed in the host pool, in the order they were loaded.

        The cache places them when it has room (:meth:`start_read`), else :meth:`drop_cpu_tensors`.
        """
        return [lora_id for lora_id in self._weights.lora_manager.loras if self._has_tensors(lora_id)]

    def drop_cpu_tensors(self, lora_id: str) -> bool:
        """Drop SGLang's CPU tensors; the adapter object stays, with config, scaling and shapes.

        Returns False, with nothing changed, when they are the only copy: no file and no host slots.
        """
        if not self.has_file(lora_id) and lora_id not in self._packed and lora_id not in self._kept:
            return False
        _clear(self._weights.lora_manager.loras[lora_id])
        return True

    def memory_matrices(self, lora_id: str) -> Callable[[int], LayerMatrices] | None:
        """The adapter's matrices by layer, from memory; None when they are not there."""
        kept = self._kept.get(lora_id)
        if kept is not None:
            return lambda layer: kept[layer]
        if not self._has_tensors(lora_id):
            return None
        adapter = self._weights.lora_manager.loras[lora_id]
        return lambda layer: self._weights.matrices(adapter, layer)

    def read_file(self, lora_id: str) -> Callable[[int], LayerMatrices]:
        """The matrices by layer, read from the file now. Blocks. Raises AdapterError."""
        adapter = self._read_file(lora_id)
        return lambda layer: self._weights.matrices(adapter, layer)

    # -- reading --------------------------------------------------------------------------------

    def start_read(self, lora_id: str, host_slots: torch.Tensor | None = None) -> None:
        """Bring the adapter into ``host_slots``, from memory or its file, in the background.

        Args:
            host_slots: int64 ``[slots_needed]``, whole pages, any order; in use until :meth:`poll_reads` names
                the adapter. None: into CPU tensors, from which ``load`` then writes to the device (for a
                host pool that has no room for it).

        Raises:
            ValueError: it is being read, has a host copy, or the slots do not fit.
        """
        ref = self._weights.lora_manager.lora_refs[lora_id]
        self._reader.start(lora_id, str(ref.lora_path), self._job(lora_id, host_slots))

    def poll_reads(self, *, wait: bool = False) -> list[tuple[str, AdapterError | None]]:
        """Reads that ended since the last call, in the order of their start; ``wait``: all that were started.

        With an error (the text is one line that names file and fault, for the client; ``status_code`` goes with it)
        the host slots hold nothing and are the caller's again. The next :meth:`start_read` tries anew, so an
        adapter recovers when its file is back.
        """
        return [(lora_id, self._finish(lora_id, found)) for lora_id, found in self._reader.done(wait=wait)]

    def read_into_host(self, lora_id: str, host_slots: torch.Tensor) -> None:
        """As :meth:`start_read`, at once. Raises AdapterError; ValueError as there."""
        if lora_id in self._reader:
            raise ValueError(f"elora: {lora_id} is being read already")
        job = self._job(lora_id, host_slots)
        where = str(self._weights.lora_manager.lora_refs[lora_id].lora_path)
        error = self._finish(lora_id, as_result(where, job))
        if error is not None:
            raise error

    def _job(self, lora_id: str, host_slots: torch.Tensor | None) -> Callable[[], _Read]:
        """What a read does; everything but the reading and packing is done here, in the caller's thread."""
        self._require_absent(lora_id)
        packed = None if host_slots is None else self._place(lora_id, host_slots)
        ready = self.memory_matrices(lora_id)
        ref, like = self._weights.lora_manager.lora_refs[lora_id], self._weights.lora_manager.loras[lora_id]
        base_model = self._weights.base_model

        def job() -> _Read:
            adapter = None if ready is not None else read_version(ref, like, base_model)
            if packed is not None:
                packed.write(ready or (lambda layer: self._weights.matrices(adapter, layer)))
                return packed, None
            return None, adapter

        return job

    def _finish(self, lora_id: str, found: _Read | AdapterError) -> AdapterError | None:
        if isinstance(found, AdapterError):
            return found
        loaded = self._weights.lora_manager.loras.get(lora_id)
        if loaded is None:
            return AdapterError(lora_id, "was unloaded while it was being read", "Load it again.")
        packed, adapter = found
        if packed is not None:
            self._packed[lora_id] = packed
            self._forget_memory(lora_id)
        elif adapter is not None:
            for mine, new in zip(loaded.layers, adapter.layers, strict=True):
                mine.weights = new.weights
        return None

    def _read_file(self, lora_id: str) -> LoRAAdapter:
        known = self._weights.lora_manager
        return read_version(known.lora_refs[lora_id], known.loras[lora_id], self._weights.base_model)

    def _place(self, lora_id: str, host_slots: torch.Tensor) -> PackedAdapter:
        if self._host is None:
            raise ValueError("elora: there is no host pool; --elora-host-memory is 0")
        return PackedAdapter(self._host, self._weights.layout(lora_id), host_slots, self._weights.dtype)

    def _require_absent(self, lora_id: str) -> None:
        if lora_id in self._packed:
            raise ValueError(f"elora: adapter {lora_id} has a host copy already")

    def _has_tensors(self, lora_id: str) -> bool:
        adapter = self._weights.lora_manager.loras.get(lora_id)
        return adapter is not None and any(layer.weights for layer in adapter.layers)

    def _forget_memory(self, lora_id: str) -> None:
        self._kept.pop(lora_id, None)
        _clear(self._weights.lora_manager.loras[lora_id])


def bound_waiting(lora_manager: LoadedAdapters, lora_id: str, *, limit: int = WAITING_BYTES) -> None:
    """An adapter was registered: keep no more than ``limit`` bytes of CPU tensors that a file has, too.

    Works before the pools exist, as adapters of --lora-paths are loaded first. Mutates SGLang's adapters.
    """
    waiting: dict[str, int] = lora_manager.__dict__.setdefault(_WAITING, {})
    if has_file(lora_manager.lora_refs[lora_id]):
        layers = lora_manager.loras[lora_id].layers
        waiting[lora_id] = sum(t.nbytes for layer in layers for t in layer.weights.values())
    while sum(waiting.values()) > limit:
        oldest = next(iter(waiting))
        del waiting[oldest]
        if oldest in lora_manager.loras:
            _clear(lora_manager.loras[oldest])


def _clear(adapter: LoRAAdapter) -> None:
    for layer in adapter.layers:
        layer.weights.clear()
        layer.pinned_weights.clear()


def joined(layers: list[dict[tuple[str, int], torch.Tensor]]) -> torch.Tensor:
    """All matrices' bytes one after the other: uint8 on the CPU."""
    parts = [
        layer[key].contiguous().view(torch.uint8).flatten().cpu() for layer in layers for key in sorted(layer)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
