"""Load and unload adapters: the scheduler processes' side. Every tensor-parallel rank does the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.runtime_context import get_parallel, get_server_args

from elora_sglang.integration.adapters.messages import AdapterInUse
from elora_sglang.integration.plugin import config, flags_lora
from elora_sglang.integration.plugin.verify import Refused
from elora_sglang.integration.weights.store import bound_waiting
from elora_sglang.runtime.adapters.check import BaseModelShape, adapted_modules
from elora_sglang.runtime.adapters.files import AdapterError, AdapterFiles, parse_safetensors, read_folder
from elora_sglang.runtime.adapters.tensors import TENSORS, from_tensors
from elora_sglang.runtime.adapters.versions import is_version
from elora_sglang.runtime.pool import host_size

if TYPE_CHECKING:
    from sglang.srt.lora.lora_registry import LoRARef
    from sglang.srt.managers.io_struct import (
        LoadLoRAAdapterFromTensorsReqInput,
        LoRAUpdateOutput,
        UnloadLoRAAdapterReqInput,
    )
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler

#: Largest share of the pool that pinned adapters may take together; the rest serves everything else.
PINNED_SHARE = 0.5


class EloraLoRAManager(LoRAManager):
    """SGLang's LoRA manager (``lora/lora_manager.py``): reads an adapter once, for the modules of the pool."""

    def _load_lora_adapter(self, lora_ref: LoRARef) -> LoRAUpdateOutput:
        """Reads the folder once and loads exactly what was hashed. Does not call the stock method, which reads it
        twice, after the configuration has been checked. Called while the manager is made, too."""
        return load_adapter(self, lora_ref, lambda: read_folder(lora_ref.lora_path))

    def init_lora_shapes(self, max_lora_rank: int | None = None, target_modules: Any = None) -> None:
        """``all`` means the linear modules of the model: there is no place in the KV pool for an embedding."""
        modules = flags_lora.linear_modules(self.base_model, target_modules)
        super().init_lora_shapes(max_lora_rank=max_lora_rank, target_modules=modules)


def load_from_tensors(manager: LoRAManager, recv_req: LoadLoRAAdapterFromTensorsReqInput) -> LoRAUpdateOutput:
    """Load an adapter from the safetensors bytes of this rank; never a pickle. Mutates the manager.

    The tokenizer process has decoded and checked what the client sent.
    """
    payload = recv_req.serialized_named_tensors[get_parallel().tp_rank]

    def read() -> AdapterFiles:
        tensors = parse_safetensors(bytearray(payload), TENSORS)
        return from_tensors(tensors, recv_req.config_dict, recv_req.added_tokens_config)

    return load_adapter(manager, recv_req.to_ref(), read)


def load_adapter(manager: LoRAManager, ref: LoRARef, read: Callable[[], AdapterFiles]) -> LoRAUpdateOutput:
    """Put an adapter's CPU weights into the manager, or leave the manager as it was and say why not."""
    try:
        files = read()
        if not is_version(ref.lora_id, files.version()):
            raise AdapterError(
                files.weights_file,
                "changed while it was being loaded",
                "Load it again; replace files by renaming a finished folder.",
            )
        base = BaseModelShape.from_config(manager.base_hf_config.get_text_config())
        lora_config = LoRAConfig.from_dict({**files.config, "target_modules": adapted_modules(files, base)})
        lora_config.path = ref.lora_path
        pool = getattr(manager, "memory_pool", None)  # at start-up the pool is built after the adapters
        if pool is not None:
            pool.can_support(lora_config)
        manager.configs[ref.lora_id] = lora_config
        manager.load_lora_weights_from_tensors(ref, files.tensors)
        manager.lora_refs[ref.lora_id] = ref
        manager.num_pinned_loras += int(bool(ref.pinned))
        if _has_host_tier(pool):
            bound_waiting(manager, ref.lora_id)
    except Exception as error:
        manager.configs.pop(ref.lora_id, None)
        manager.loras.pop(ref.lora_id, None)
        fault = str(error) or type(error).__name__
        return manager.create_lora_update_result(success=False, error_message=fault)
    return manager.create_lora_update_result(success=True)


def _has_host_tier(pool: Any) -> bool:
    """Whether adapters' bytes have a place in the host pool; before there are pools, whether they will have."""
    if pool is not None:
        store = getattr(pool, "store", None)
        return store is not None and store.host is not None
    settings = config.current(get_server_args())
    return settings.enabled and not host_size.parse(settings.host_memory).off


def load(stock: Callable[[Any], LoRAUpdateOutput], scheduler: Scheduler, recv_req: Any) -> LoRAUpdateOutput:
    """Load with ``stock(recv_req)``, and undo it when the pool cannot hold the adapter. Mutates the LoRA manager.

    Loaded on every tensor-parallel rank or on none: only rank 0 answers the tokenizer process.
    """
    result = stock(recv_req)
    manager = scheduler.tp_worker.model_runner.lora_manager
    fault: str | None = result.error_message
    if result.success:
        fault = room_fault(manager, recv_req.to_ref(), scheduler.max_total_num_tokens, scheduler.page_size)
    if everywhere(scheduler, fault is None):
        return result
    if result.success:
        manager.unload_lora_adapter(recv_req.to_ref())
    where = f"Adapter refused: {recv_req.to_ref().lora_path}"
    fault = (
        fault or f"{where}: another tensor-parallel rank could not load it; its log says why. Load it again."
    )
    return manager.create_lora_update_result(success=False, error_message=fault)


def everywhere(scheduler: Scheduler, here: bool) -> bool:
    """Whether all tensor-parallel ranks say ``here``; a collective when there are several."""
    if scheduler.tp_size == 1:
        return here
    votes = torch.tensor([int(here)])
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=scheduler.tp_cpu_group)
    return bool(votes.item())


def room_fault(manager: LoRAManager, ref: LoRARef, pool_slots: int, page_size: int) -> str | None:
    """Why the pool cannot serve this loaded adapter, or None. Mutates nothing."""
    pool = manager.memory_pool
    try:
        own = pool.slots_needed(ref.lora_id)
    except (AdapterError, ValueError) as error:
        return str(error)
    where = f"Adapter refused: {ref.lora_path}: {ref.lora_name!r}"
    if own + page_size + 1 >= pool_slots:
        return (
            f"{where} needs {own} of the pool's {pool_slots} slots, which leaves no room for a request. "
            "Raise --mem-fraction-static or --max-total-tokens."
        )
    if ref.pinned:
        # Versions of one name do not add up: a replaced one is on its way out.
        slots = {other.lora_name: pool.slots_needed(lora_id) for lora_id, other in _pinned(manager)}
        slots[ref.lora_name] = own
        if sum(slots.values()) > PINNED_SHARE * pool_slots:
            return (
                f"{where} is pinned, and pinned adapters would take {sum(slots.values())} of the pool's "
                f"{pool_slots} slots; at most {PINNED_SHARE:.0%} may be pinned. Load it without pinned, "
                "or raise --mem-fraction-static or --max-total-tokens."
            )
    return None


def _pinned(manager: LoRAManager) -> Iterator[tuple[str, LoRARef]]:
    return ((lora_id, ref) for lora_id, ref in manager.lora_refs.items() if ref.pinned)


def check_start_adapters(scheduler: Scheduler) -> None:
    """The same limits for the adapters of --lora-paths, once a pool exists. Raises Refused."""
    manager = scheduler.tp_worker.model_runner.lora_manager
    for ref in manager.lora_refs.values():
        fault = room_fault(manager, ref, scheduler.max_total_num_tokens, scheduler.page_size)
        if fault is not None:
            raise Refused(fault)


def unload(
    stock: Callable[[Any], LoRAUpdateOutput], scheduler: Scheduler, recv_req: UnloadLoRAAdapterReqInput
) -> LoRAUpdateOutput:
    """Drop the adapter's branch, then its weights with ``stock(recv_req)``; :class:`AdapterInUse` while it runs."""
    users = (req for req in _requests(scheduler) if req.lora_id == recv_req.lora_id and not req.finished())
    running = len({id(req) for req in users})
    if running:
        return AdapterInUse(
            success=False,
            error_message=f"{running} requests of version {recv_req.lora_id} still run",
            running=running,
        )
    scheduler_unload(scheduler, recv_req.lora_id)
    return stock(recv_req)


def scheduler_unload(scheduler: Scheduler, lora_id: str) -> None:
    """Drop the adapter's branch: slots of weights and KV are free at once, locked ones when their lock ends.

    Mutates tree and pool; idempotent, a version without a branch is no error.
    """
    scheduler.tree_cache.adapters.drop(lora_id)


def _requests(scheduler: Scheduler) -> Iterator[Req]:
    """Every request this scheduler holds; some more than once."""
    yield from scheduler.waiting_queue
    yield from scheduler.grammar_manager.grammar_queue
    for batch in (scheduler.running_batch, scheduler.last_batch):
        yield from batch.reqs if batch is not None else ()
    if scheduler.chunked_req is not None:
        yield scheduler.chunked_req
