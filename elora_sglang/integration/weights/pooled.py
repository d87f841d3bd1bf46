"""Adapters in KV token slots: how they are laid out, which are resident, and their bytes.

What ELORA asks of the LoRA pool (:mod:`elora_sglang.runtime.lora_pool`). SGLang's side of it is in ``pool.py``. The two
are apart so that the type checker can compare this one with what is asked: a class of SGLang's would answer anything.
"""

from __future__ import annotations

from collections.abc import Callable, KeysView
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from elora_sglang.integration.weights import shards as lora_shards
from elora_sglang.integration.weights.store import AdapterStore, joined
from elora_sglang.runtime.lora_pool import AdapterSource, BatchAdapters, HostAdapters, LoRAPool
from elora_sglang.runtime.pool.layout import AdapterLayout, ModuleShape, plan_adapter
from elora_sglang.runtime.pool.packing import LayerMatrices, PackedAdapter
from elora_sglang.runtime.pool.views import UnifiedPool

if TYPE_CHECKING:
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_manager import LoRAManager


class PooledAdapters:
    """Answers what the cache and the LoRA backend ask of the pool. Decides and evicts nothing.

    Life of an adapter here: ``slots_needed`` (any time after it is registered), ``load`` into slots, or ``adopt`` of
    slots that a transfer fills, any number of batches, ``drop``. ``bind`` must come before the first of them.

    Attributes:
        store: the host side: where the bytes of adapters are that are not resident, and how they get there.
        layer_fence: called with a layer before its first adapter weights are read in a batch; see :meth:`wait_layer`.
        graph_rank: LoRA rank that CUDA graphs shall have room for, if there are any (``--elora-graph-rank``).
        most_rank: the largest LoRA rank that CUDA graphs have room for; None: no graphs, no limit.
        batch_adapters: this batch's adapters by buffer id; None is the base model.
    """

    # Set by SGLang's constructor (lora/mem_pool.py).
    base_model: torch.nn.Module
    dtype: torch.dtype
    num_layer: int
    max_loras_per_batch: int
    target_modules: set[str]

    def __init__(self) -> None:
        self._pool: UnifiedPool | None = None
        self._lora_manager: LoRAManager | None = None
        self._layouts: dict[str, AdapterLayout] = {}
        self._packed: dict[str, PackedAdapter] = {}
        self.store = AdapterStore(self)
        self.layer_fence: Callable[[int], None] | None = None
        self.graph_rank = 128
        self.most_rank: int | None = None
        self.batch_adapters: list[PackedAdapter | None] = [None]

    # -- wiring ---------------------------------------------------------------------------------

    def attach(self, lora_manager: LoRAManager) -> None:
        """Learn where CPU weights and wrapped layers are, and become the backend's source of weights."""
        self._lora_manager = lora_manager
        lora_manager.lora_backend.memory_pool = self

    def bind(self, pool: UnifiedPool) -> None:
        """Adapters live in ``pool`` from now on. Forgets all residency of an earlier pool."""
        if pool.num_layers != self.num_layer:
            raise ValueError(
                f"elora: the KV pool has {pool.num_layers} layers, the model {self.num_layer}; "
                "pipeline parallelism and layer-sharing models are not supported"
            )
        self._pool = pool
        self._layouts.clear()
        self.drop_all()

    @property
    def pool(self) -> UnifiedPool:
        if self._pool is None:
            raise RuntimeError("elora: the KV pool is not bound yet; the hook that binds it did not run")
        return self._pool

    @property
    def lora_manager(self) -> LoRAManager:
        if self._lora_manager is None:
            raise RuntimeError(
                "elora: the LoRA manager is not attached; the hook that attaches it did not run"
            )
        return self._lora_manager

    @property
    def largest_rank(self) -> int:
        """Of the adapters in this process, resident or not; 0 for none."""
        parts = [
            part.rank
            for lora_id in self.lora_manager.loras
            for layer in self.layout(lora_id).layers
            for module in layer.modules
            for part in module.slices
        ]
        return max(parts, default=0)

    @property
    def on_cuda(self) -> bool:
        return self.pool.device.type == "cuda"

    # -- adapters -------------------------------------------------------------------------------

    def slots_needed(self, lora_id: str) -> int:
        """Slots that adapter ``lora_id`` takes: whole pages, the same number on every tp rank.

        Depends on shapes only, and every tp rank's shard has the same shapes (SGLang cuts evenly).

        Raises:
            AdapterError: the adapter does not fit this model; the text names its file and the fault.
        """
        return self.layout(lora_id).slots

    def is_pinned(self, lora_id: str) -> bool:
        reference = self.lora_manager.lora_refs.get(lora_id)
        return bool(reference is not None and reference.pinned)

    def loaded(self) -> KeysView[str]:
        """Ids of all adapters in this process, resident or not. A view that changes with them."""
        loras: dict[str, LoRAAdapter] = self.lora_manager.loras
        return loras.keys()

    def is_loaded(self, lora_id: str) -> bool:
        """Whether the adapter's weights are in this process, resident in the pool or not."""
        return lora_id in self.lora_manager.loras

    def pinned_slots(self, *, excluding: str | None = None) -> int:
        """Slots that all pinned adapters but ``excluding`` take once they have been used."""
        if not self.lora_manager.num_pinned_loras:
            return 0
        pinned = (uid for uid, ref in self.lora_manager.lora_refs.items() if ref.pinned and uid != excluding)
        return sum(self.slots_needed(uid) for uid in pinned)

    @property
    def resident(self) -> dict[str, torch.Tensor]:
        """Slots of every resident adapter, ascending, int64 on the pool's device. A new dict."""
        return {lora_id: packed.slots for lora_id, packed in self._packed.items()}

    def load(self, lora_id: str, slots: torch.Tensor) -> None:
        """Write the adapter's weights into ``slots`` now and make it resident. Mutates the pool.

        From its host copy, else from memory, else from its file, which blocks on the disk.

        Args:
            slots: int64 ``[slots_needed(lora_id)]``, whole pages, any order; owned by the adapter
                until ``drop``.

        Raises:
            ValueError: already resident, or slots that cannot hold it. Nothing is resident then.
            AdapterError: its file is gone, broken or has other content. Nothing is resident then.
        """
        packed = self._place(lora_id, slots)
        self._adapter(lora_id)  # KeyError for one that is not loaded
        if self.store.source(lora_id) == "host":
            self.store.copy_rows(lora_id, packed)
        else:
            packed.write(self.store.memory_matrices(lora_id) or self.store.read_file(lora_id))
            if self.store.host is not None:
                self.store.drop_cpu_tensors(lora_id)
        self._packed[lora_id] = packed

    def adopt(self, lora_id: str, slots: torch.Tensor) -> None:
        """Make the adapter resident in ``slots`` without writing: a transfer brings, or brought, its bytes.

        The transfer must copy ascending host slots to ascending device slots, and a batch that uses the adapter
        before it has ended must be fenced by :attr:`layer_fence`. Raises ValueError as :meth:`load`.
        """
        self._packed[lora_id] = self._place(lora_id, slots)

    def _place(self, lora_id: str, slots: torch.Tensor) -> PackedAdapter:
        if lora_id in self._packed:
            raise ValueError(f"elora: adapter {lora_id} is already resident")
        return PackedAdapter(self.pool, self.layout(lora_id), slots, self.dtype)

    def wait_layer(self, layer: int) -> None:
        """The LoRA backend is about to read weights of ``layer``; returns when their transfers are ordered before."""
        if self.layer_fence is not None:
            self.layer_fence(layer)

    def drop(self, lora_id: str) -> None:
        """Forget where the adapter is; its slots belong to the caller again. Idempotent."""
        self._packed.pop(lora_id, None)
        if self._lora_manager is not None and lora_id not in self._lora_manager.loras:
            self._layouts.pop(lora_id, None)
            self.store.forget(lora_id)

    def drop_all(self) -> None:
        """Forget all residency, as after a flush."""
        self._packed.clear()
        self.batch_adapters = [None]

    def read_bytes(self, lora_id: str) -> torch.Tensor:
        """The resident adapter's weights as they are in the pool now: uint8 ``[payload bytes]``, a copy.

        Matrices in layer, module, matrix order, without alignment and unused tails.
        """
        return joined(self._packed[lora_id].read())

    def expected_bytes(self, lora_id: str, *, from_files: bool = False) -> torch.Tensor:
        """What :meth:`read_bytes` must return: rebuilt from memory, or from the files again.

        An adapter without a file is rebuilt from memory in either case; one that has its only bytes in the host
        pool, from there. Raises AdapterError: the file is gone, broken or has other content.
        """
        if self.store.has_file(lora_id) and (from_files or self.store.source(lora_id) == "file"):
            matrices = self.store.read_file(lora_id)
        elif (found := self.store.memory_matrices(lora_id)) is not None:
            matrices = found
        else:
            return self.store.host_bytes(lora_id)
        layers: list[dict[tuple[str, int], torch.Tensor]] = []
        for layer, part in enumerate(self.layout(lora_id).layers):
            sources = matrices(layer)
            keys = [(m.name, i) for m in part.modules for i in range(1 + len(m.slices))]
            layers.append({key: sources[key].to(self.dtype).contiguous() for key in keys})
        return joined(layers)

    def _adapter(self, lora_id: str) -> LoRAAdapter:
        adapter = self.lora_manager.loras.get(lora_id)
        if adapter is None:
            raise KeyError(f"elora: adapter {lora_id} is not loaded")
        return adapter

    def layout(self, lora_id: str) -> AdapterLayout:
        """Where its matrices lie in slots, on the device as in the host pool."""
        layout = self._layouts.get(lora_id)
        if layout is None:
            adapter = self._adapter(lora_id)
            shapes = [self._shapes(adapter, layer) for layer in range(self.num_layer)]
            layout = self._layouts[lora_id] = plan_adapter(
                shapes,
                itemsize=self.dtype.itemsize,
                row_bytes=self.pool.row_bytes,
                page_size=self.pool.page_size,
            )
        return layout

    def _wrapped(self, layer: int) -> dict[str, Any]:
        return lora_shards.modules_by_name(self.lora_manager.lora_modules[layer], self.target_modules)

    def _shapes(self, adapter: LoRAAdapter, layer: int) -> tuple[ModuleShape, ...]:
        return lora_shards.shapes(adapter, layer, self._wrapped(layer))

    def part_widths(self, layer: int, module: str) -> tuple[int, ...]:
        """Output features of each part (q, k, v) of a module on this tp rank."""
        edges = [int(edge) for edge in self._wrapped(layer)[module].lora_offsets]
        return tuple(last - first for first, last in pairwise(edges))

    def matrices(self, adapter: LoRAAdapter, layer: int) -> LayerMatrices:
        """This rank's matrices of one layer of an adapter that has its tensors."""
        return lora_shards.matrices(adapter, layer, self._wrapped(layer), self.target_modules)


def _answers(pool: PooledAdapters) -> tuple[LoRAPool, HostAdapters, AdapterSource, BatchAdapters]:
    """Compared by mypy: it is what it is asked to be."""
    return pool, pool.store, pool, pool
