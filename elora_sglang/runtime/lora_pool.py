"""What ELORA asks of the LoRA pool, written down: who asks for what, and what the answers mean.

Three askers, three protocols:

:class:`LoRAPool`
    asked by the prefix cache, admission, :class:`~elora_sglang.runtime.swap_driver.SwapDriver`,
    :class:`~elora_sglang.runtime.tree_adapters.TreeAdapters` and the auditor: which adapters there are, and
    where they lie. Its host side is :class:`HostAdapters`.
:class:`AdapterSource`
    asked by the host side: how an adapter is laid out, and its matrices.
:class:`BatchAdapters`
    asked by the LoRA backend and its kernels: the adapters of the batch that runs.

``EloraLoRAMemoryPool`` (``integration/weights/pool.py``) is all three. The stand-in without a model, for tests and
measurements, is ``elora_sglang.eval.support.lora_pool``. Slots are int64 tensors ``[slots]``; an adapter's bytes lie in
ascending slots on both tiers, whatever the order in which they were given. All calls come from the scheduler's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch

from elora_sglang.runtime.adapters.files import AdapterError
from elora_sglang.runtime.pool.layout import AdapterLayout
from elora_sglang.runtime.pool.packing import LayerMatrices, PackedAdapter
from elora_sglang.runtime.pool.views import UnifiedPool


class HostAdapters(Protocol):
    """Where adapters' bytes are besides the device: host slots, CPU tensors, or their files."""

    def bind(self, host: UnifiedPool) -> None:
        """Host copies lie in ``host`` from now on; those in an earlier pool are forgotten."""

    def in_memory(self) -> list[str]:
        """Adapters whose CPU tensors wait to be placed in the host pool, in the order they were loaded."""

    def drop_cpu_tensors(self, lora_id: str) -> bool:
        """Give up its CPU tensors. False, with nothing changed, when they are the only copy."""

    def read_into_host(self, lora_id: str, host_slots: torch.Tensor) -> None:
        """Write its bytes into the host slots, at once. Raises AdapterError, ValueError as :meth:`start_read`."""

    def start_read(self, lora_id: str, host_slots: torch.Tensor) -> None:
        """Bring its bytes into the host slots in the background, which are in use until :meth:`poll_reads` names it.

        Raises:
            ValueError: it is being read, has a host copy, or the slots do not fit.
            KeyError: it is not loaded.
        """

    def poll_reads(self, *, wait: bool = False) -> list[tuple[str, AdapterError | None]]:
        """Reads that ended since the last call, in the order of their start; ``wait``: all that were started.

        After an error the host slots hold nothing and are the caller's again.
        """

    def drop_host(self, lora_id: str) -> None:
        """Forget its host copy; the slots are the caller's again. Idempotent."""

    def drop_all(self) -> None:
        """Forget all host copies, after waiting for reads in flight."""

    def host_bytes(self, lora_id: str) -> torch.Tensor:
        """Its host copy as it is now, uint8, in the form of :meth:`LoRAPool.read_bytes`. KeyError: it has none."""


class LoRAPool(Protocol):
    """Adapters in slots of the KV pool. It decides nothing and evicts nothing."""

    #: Called with a layer before its first adapter weights are read in a batch; None: nothing to wait for.
    layer_fence: Callable[[int], None] | None

    @property
    def pool(self) -> UnifiedPool:
        """The KV pool. Raises RuntimeError before there is one."""

    @property
    def on_cuda(self) -> bool:
        """Whether the pool is in GPU memory."""

    @property
    def store(self) -> HostAdapters:
        """Its host side."""

    @property
    def resident(self) -> Mapping[str, torch.Tensor]:
        """Device slots of every resident adapter, ascending."""

    def loaded(self) -> Collection[str]:
        """Ids of all adapters in this process, resident or not. A view that changes with them."""

    def is_loaded(self, lora_id: str) -> bool:
        """Whether the adapter is in this process, resident or not."""

    def is_pinned(self, lora_id: str) -> bool:
        """Whether it must stay resident once it is."""

    def slots_needed(self, lora_id: str) -> int:
        """Slots that it takes: whole pages, as many on every tp rank. Raises AdapterError, KeyError."""

    def pinned_slots(self, *, excluding: str | None = None) -> int:
        """Slots that all pinned adapters but ``excluding`` take once they are resident."""

    def load(self, lora_id: str, slots: torch.Tensor) -> None:
        """Write its weights into ``slots`` and make it resident. Mutates the pool; may block on its file.

        Raises AdapterError, ValueError; nothing is resident then.
        """

    def adopt(self, lora_id: str, slots: torch.Tensor) -> None:
        """Make it resident in ``slots``, which a transfer fills. Raises ValueError as :meth:`load`."""

    def drop(self, lora_id: str) -> None:
        """It is not resident any more; its slots are the caller's again. Idempotent."""

    def drop_all(self) -> None:
        """No adapter is resident any more."""

    def read_bytes(self, lora_id: str) -> torch.Tensor:
        """The resident adapter's weights as they are in the pool now: uint8 ``[payload bytes]``, a copy."""

    def expected_bytes(self, lora_id: str, *, from_files: bool = False) -> torch.Tensor:
        """What :meth:`read_bytes` must return, from memory or from its files again. Raises AdapterError."""


class LoadedAdapters(Protocol):
    """What is read of SGLang's ``LoRAManager`` (``lora/lora_manager.py``), by adapter id."""

    #: ``LoRAAdapter`` objects, with or without their CPU tensors.
    loras: dict[str, Any]
    #: ``LoRARef`` objects: name, path, whether pinned.
    lora_refs: dict[str, Any]


class AdapterSource(Protocol):
    """What the host side asks of the pool whose adapters it keeps."""

    #: Stored type of the weights.
    dtype: torch.dtype
    #: The model whose layers the adapters change.
    base_model: torch.nn.Module

    @property
    def lora_manager(self) -> LoadedAdapters:
        """The adapters that SGLang has loaded. Raises RuntimeError before it is attached."""

    def layout(self, lora_id: str) -> AdapterLayout:
        """Where its matrices lie in slots, on both tiers."""

    def matrices(self, adapter: Any, layer: int) -> LayerMatrices:
        """This tp rank's matrices of one layer of a ``LoRAAdapter`` that has its tensors."""


class BatchAdapters(Protocol):
    """What the LoRA backend and its kernels ask: the batch's adapters, and the rows that they lie in."""

    #: Stored type of the weights.
    dtype: torch.dtype
    #: Normalised names of the modules that adapters may change.
    target_modules: set[str]
    num_layer: int
    max_loras_per_batch: int
    #: This batch's adapters by buffer id; None is the base model.
    batch_adapters: list[PackedAdapter | None]
    #: LoRA rank that CUDA graphs shall have room for.
    graph_rank: int
    #: The largest LoRA rank that CUDA graphs have room for; None: no graphs, no limit. Set by the backend.
    most_rank: int | None

    @property
    def pool(self) -> UnifiedPool:
        """The KV pool, whose rows the kernels read."""

    @property
    def largest_rank(self) -> int:
        """Of the adapters in this process, resident or not; 0 for none."""

    def wait_layer(self, layer: int) -> None:
        """Weights of ``layer`` are about to be read; returns when their transfers are ordered before."""

    def part_widths(self, layer: int, module: str) -> tuple[int, ...]:
        """Output features of each part (q, k, v) of a module on this tp rank."""
