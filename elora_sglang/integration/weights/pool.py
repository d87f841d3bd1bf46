"""SGLang's LoRA memory pool without memory of its own: adapters live in KV token slots.

Replaces ``sglang.srt.lora.mem_pool.LoRAMemoryPool``. It knows how adapters are laid out and which are
resident, writes them into slots it is given, and hands them to the LoRA backend. Which adapter is
resident is decided elsewhere (the cache's dependency tree); this class never evicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.mem_pool import LoRAMemoryPool
from sglang.srt.lora.utils import EMBEDDING_NAMES, get_normalized_target_modules

from elora_sglang.integration.weights import shards as lora_shards
from elora_sglang.integration.weights.store import AdapterStore, joined
from elora_sglang.runtime.adapters.files import AdapterError
from elora_sglang.runtime.pool.layout import AdapterLayout, ModuleShape, plan_adapter
from elora_sglang.runtime.pool.packing import LayerMatrices, PackedAdapter
from elora_sglang.runtime.pool.views import UnifiedPool

if TYPE_CHECKING:
    from sglang.srt.lora.layers import BaseLayerWithLoRA
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_manager import LoRAManager

#: Attribute of the placeholder tensors that LoRA layers hold: (layer, module name).
PLACE = "_elora_place"


class EloraLoRAMemoryPool(LoRAMemoryPool):
    """Adapters in slots of the KV pool. Same constructor as the class it replaces.

    Life of an adapter here: ``slots_needed`` (any time after it is registered), ``load`` into slots, or ``adopt`` of
    slots that a transfer fills, any number of batches, ``drop``. ``bind`` must come before the first of them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pool: UnifiedPool | None = None
        self._manager: LoRAManager | None = None
        self._layouts: dict[str, AdapterLayout] = {}
        self._packed: dict[str, PackedAdapter] = {}
        #: The host side: where the bytes of adapters are that are not resident, and how they get there.
        self.store = AdapterStore(self)
        #: Called with a layer before its first adapter weights are read in a batch; see :meth:`wait_layer`.
        self.layer_fence: Callable[[int], None] | None = None
        #: LoRA rank that CUDA graphs shall have room for, if there are any (``--elora-graph-rank``).
        self.graph_rank = 128
        #: The largest LoRA rank that CUDA graphs have room for; None: no graphs, no limit.
        self.most_rank: int | None = None
        #: This batch's adapters by buffer id; None is the base model.
        self.batch_adapters: list[PackedAdapter | None] = [None]
        super().__init__(*args, **kwargs)

    # -- wiring ---------------------------------------------------------------------------------

    def init_buffers(self, base_model: torch.nn.Module) -> None:
        """Allocate nothing: the buffers are shapes without memory, which LoRA layers read and pass on."""
        if self._has_moe_module(base_model):
            raise ValueError(
                "elora: LoRA on mixture-of-experts models is not supported; serve without --elora"
            )
        refuse_embeddings(self.target_modules)
        self.base_model = base_model
        for buffers, shape_of in (
            (self.A_buffer, self.get_lora_A_shape),
            (self.B_buffer, self.get_lora_B_shape),
        ):
            for module in sorted(self.target_modules):
                buffers[module] = [
                    _placeholder(shape_of(module, base_model, self.max_lora_rank, layer), layer, module)
                    for layer in range(self.num_layer)
                ]

    def attach(self, manager: LoRAManager) -> None:
        """Learn where CPU weights and wrapped layers are, and become the backend's source of weights."""
        self._manager = manager
        manager.lora_backend.memory_pool = self

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
    def manager(self) -> LoRAManager:
        if self._manager is None:
            raise RuntimeError(
                "elora: the LoRA manager is not attached; the hook that attaches it did not run"
            )
        return self._manager

    @property
    def largest_rank(self) -> int:
        """Of the adapters in this process, resident or not; 0 for none."""
        parts = [
            part.rank
            for lora_id in self.manager.loras
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
        reference = self.manager.lora_refs.get(lora_id)
        return bool(reference is not None and reference.pinned)

    def is_loaded(self, lora_id: str) -> bool:
        """Whether the adapter's weights are in this process, resident in the pool or not."""
        return lora_id in self.manager.loras

    def pinned_slots(self, *, excluding: str | None = None) -> int:
        """Slots that all pinned adapters but ``excluding`` take once they have been used."""
        if not self.manager.num_pinned_loras:
            return 0
        pinned = (uid for uid, ref in self.manager.lora_refs.items() if ref.pinned and uid != excluding)
        return sum(self.slots_needed(uid) for uid in pinned)

    @property
    def resident(self) -> dict[str, torch.Tensor]:
        """Slots of every resident adapter, ascending, int64 on the pool's device. A new dict."""
        return {lora_id: packed.slots for lora_id, packed in self._packed.items()}

    def slots_of(self, lora_id: str) -> torch.Tensor:
        """The resident adapter's slots, *ascending*: row i is row i of its ascending host slots. KeyError: none."""
        return self._packed[lora_id].slots

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

    def drop(self, lora_id: str, slots: torch.Tensor | None = None) -> None:
        """Forget where the adapter is; its slots belong to the caller again. Idempotent."""
        self._packed.pop(lora_id, None)
        if self._manager is not None and lora_id not in self._manager.loras:
            self._layouts.pop(lora_id, None)
            self.store.forget(lora_id)

    def drop_all(self) -> None:
        """Forget all residency, as after a flush."""
        self._packed.clear()
        # SGLang captures graphs and warms up with batches of the base model that no `prepare_lora_batch` here saw.
        self.batch_adapters = [None]
        self.uid_to_buffer_id: dict[str | None, int] = {None: 0}

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
        adapter = self.manager.loras.get(lora_id)
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

    def _wrapped(self, layer: int) -> dict[str, BaseLayerWithLoRA]:
        return lora_shards.modules_by_name(self.manager.lora_modules[layer], self.target_modules)

    def _shapes(self, adapter: LoRAAdapter, layer: int) -> tuple[ModuleShape, ...]:
        return lora_shards.shapes(adapter, layer, self._wrapped(layer))

    def part_widths(self, layer: int, module: str) -> tuple[int, ...]:
        """Output features of each part (q, k, v) of a module on this tp rank."""
        edges = [int(edge) for edge in self._wrapped(layer)[module].lora_offsets]
        return tuple(last - first for first, last in pairwise(edges))

    def matrices(self, adapter: LoRAAdapter, layer: int) -> LayerMatrices:
        """This rank's matrices of one layer of an adapter that has its tensors."""
        return lora_shards.matrices(adapter, layer, self._wrapped(layer), self.target_modules)

    # -- what SGLang calls ------------------------------------------------------------------------

    def can_support(self, config: LoRAConfig | Iterable[LoRAConfig]) -> bool:
        """Any LoRA rank, up to what CUDA graphs have room for; target modules must be among those that are wrapped."""
        if not isinstance(config, LoRAConfig):
            return all(self.can_support(one) for one in config)
        rank = max(config.r, *((config.hf_config or {}).get("rank_pattern") or {"": 0}).values())
        if self.most_rank is not None and rank > self.most_rank:
            raise AdapterError(
                config.path or "adapter",
                f"its LoRA rank {rank} is above {self.most_rank}, for which CUDA graphs were captured",
                f"Start the server with --elora-graph-rank {rank}, or with --disable-cuda-graph.",
            )
        targets = get_normalized_target_modules(config.target_modules)
        missing = sorted(targets - self.target_modules - {"all"})
        if missing:
            raise AdapterError(
                config.path or "adapter",
                f"target modules {', '.join(missing)} are not served",
                f"--lora-target-modules has {', '.join(sorted(self.target_modules))}.",
            )
        return True

    def prepare_lora_batch(
        self,
        cur_uids: set[str | None],
        lora_adapters: Any,
        lora_modules: Any,
        lora_refs: Any,
        lora_embed_tokens_module: Any = None,
        lora_lm_head_module: Any = None,
    ) -> None:
        """Number this batch's adapters; copies nothing. Arguments as in the class it replaces.

        Raises:
            RuntimeError: an adapter of the batch is not resident. Admission makes it so; serving the
                batch with other bytes would be wrong silently, so this is the last line of defence.
        """
        missing = sorted(uid for uid in cur_uids if uid is not None and uid not in self._packed)
        if missing:
            raise RuntimeError(f"elora: batch with adapters that are not resident: {', '.join(missing)}")
        numbered: list[str | None] = [*sorted(uid for uid in cur_uids if uid is not None)]
        if None in cur_uids or len(numbered) < self.max_loras_per_batch:
            numbered.insert(0, None)
        if len(numbered) > self.max_loras_per_batch:
            raise RuntimeError(
                f"elora: {len(numbered)} adapters in one batch, "
                f"--max-loras-per-batch is {self.max_loras_per_batch}"
            )
        self.uid_to_buffer_id = {uid: index for index, uid in enumerate(numbered)}
        self.batch_adapters = [None if uid is None else self._packed[uid] for uid in numbered]

    def remove_lora(self, uid: str) -> None:
        """SGLang unloads the adapter. Slots belong to the cache, which drops them with the branch."""
        if uid not in self._packed:
            self._layouts.pop(uid, None)
            self.store.forget(uid)


def refuse_embeddings(target_modules: set[str]) -> None:
    """Raise ValueError when LoRA on the vocabulary is asked for: it needs buffers of its own."""
    unsupported = sorted(target_modules & set(EMBEDDING_NAMES))
    if unsupported:
        raise ValueError(
            f"elora: LoRA on {', '.join(unsupported)} is not supported; remove it from --lora-target-modules"
        )


def _placeholder(shape: tuple[int, ...], layer: int, module: str) -> torch.Tensor:
    tensor = torch.empty(shape, device="meta")
    setattr(tensor, PLACE, (layer, module))
    return tensor
