"""Load, replace and unload adapters while serving: the tokenizer process's side.

A *version* is one content of an adapter under one load; SGLang's ``lora_id`` names it: 32 hex digits of
the content hash, a dash and the number of the load. KV belongs to a version, so nothing computed with
one content is served with another, and nothing survives an unload. Loading over a name in use makes
the new version current at once; requests that run keep the old one, which leaves with the last of them.

Operations on one name follow each other; operations on different names, and all requests, do not wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import (
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    UnloadLoRAAdapterReqInput,
)
from sglang.srt.runtime_context import get_lora, get_parallel
from sglang.srt.utils import normalize_serialized_named_tensor_payloads

from elora_sglang.integration.adapters.registry import VersionedRegistry
from elora_sglang.runtime.adapters.check import BaseModelShape, CheckedAdapter, check
from elora_sglang.runtime.adapters.files import AdapterError, AdapterFiles, read_folder, resolve_path
from elora_sglang.runtime.adapters.names import NameFault, check_new_name
from elora_sglang.runtime.adapters.tensors import (
    TENSORS,
    decode,
    encode,
    from_tensors,
    verify_checksums,
)
from elora_sglang.runtime.adapters.versions import is_version, version_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import fastapi
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

logger = logging.getLogger(__name__)

#: Text with which a scheduler says that a version is still in a batch; the unload is repeated then.
STILL_RUNNING = "elora: still running"

#: Pause between repeated unloads, and how often: a version that is still in a batch leaves within a step.
RETRY_SECONDS, RETRIES = 0.05, 200

_ATTRIBUTE = "_elora_lifecycle"


class AdapterLifecycle:
    """All adapter operations of one server.

    Args:
        manager: SGLang's tokenizer manager; its registry is replaced by a :class:`VersionedRegistry`.
        refs: adapters that the schedulers loaded at start, their ids made by :func:`version_id`.
    """

    def __init__(self, manager: TokenizerManager, refs: list[LoRARef]) -> None:
        self.manager = manager
        self.registry = VersionedRegistry(refs)
        self.base = BaseModelShape.from_config(manager.model_config.hf_text_config)
        self._loads = len(refs)
        self._order: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._leaving: set[asyncio.Task[str | None]] = set()
        manager.lora_registry = self.registry
        manager.lora_ref_cache = {}  # stock reloads unloaded names from it

    async def load_folder(self, request: LoadLoRAAdapterReqInput) -> LoRAUpdateOutput:
        """Load or replace from a PEFT folder."""

        def prepare() -> CheckedAdapter:
            request.lora_path = resolve_path(request.lora_path)
            return self._check(read_folder(request.lora_path))

        return await self._load(request, request.lora_path, prepare)

    async def load_tensors(
        self, request: LoadLoRAAdapterFromTensorsReqInput, *, same_process: bool
    ) -> LoRAUpdateOutput:
        """Load or replace from tensors in the request; they are decoded here, and only here."""

        def prepare() -> CheckedAdapter:
            if request.load_format is not None:
                raise AdapterError(
                    TENSORS, f"load_format {request.load_format!r} is not served", "Leave it out."
                )
            payloads = normalize_serialized_named_tensor_payloads(request.serialized_named_tensors)
            tensors = decode(payloads, same_process=same_process)
            verify_checksums(tensors, request.expected_checksums)
            checked = self._check(from_tensors(tensors, request.config_dict, request.added_tokens_config))
            request.serialized_named_tensors = encode(tensors, get_parallel().tp_size)
            request.expected_checksums = None
            return checked

        return await self._load(request, "__tensor__", prepare)

    async def unload(self, name: str) -> LoRAUpdateOutput:
        """Forget the name at once; return when its last request has ended and its slots are free."""
        async with self._order[name]:
            ref = self.registry.take(name)
        fault = await asyncio.shield(self._leave(ref))
        return self._result(fault)

    def _check(self, files: AdapterFiles) -> CheckedAdapter:
        return check(
            files,
            self.base,
            target_modules=get_lora().lora_target_modules,
            dtype=self.manager.model_config.dtype,
        )

    async def _load(
        self,
        request: LoadLoRAAdapterReqInput | LoadLoRAAdapterFromTensorsReqInput,
        path: str,
        prepare: Callable[[], CheckedAdapter],
    ) -> LoRAUpdateOutput:
        name = request.lora_name
        self._check_name(name)
        async with self._order[name]:
            checked = await asyncio.to_thread(prepare)
            current = self.registry.get(name)
            same = current is not None and is_version(current.lora_id, checked.version)
            # Its bytes may have to be read again: from a folder that is still there.
            same = same and current is not None and _can_be_read(current, path)
            if current is not None and same and bool(current.pinned) == bool(request.pinned):
                return self._result(None)
            ref = LoRARef(
                lora_id=version_id(checked.version, self._loads),
                lora_name=name,
                lora_path=path,
                pinned=bool(request.pinned),
            )
            self._loads += 1
            request.lora_id = ref.lora_id
            fault = await self._tell_schedulers(request)
            if fault is not None:
                # A rank that did take it must not keep it; unloading what is not there is no error.
                await self._tell_schedulers(UnloadLoRAAdapterReqInput(lora_name=name, lora_id=ref.lora_id))
                return self._result(fault)
            before = self.registry.put(ref)
            logger.info("Adapter %s is now version %s from %s", name, ref.lora_id, path)
            if before is not None:
                self._leave(before)
            return self._result(None)

    def _check_name(self, name: str) -> None:
        if (wrong := check_new_name(name, self.manager.served_model_name)) is not None:
            raise AdapterError(repr(name), f"this adapter name {wrong}", "Choose another name.")

    def _leave(self, ref: LoRARef) -> asyncio.Task[str | None]:
        """Start the end of a version that no new request can get."""
        task = asyncio.get_running_loop().create_task(self._drop(ref))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        return task

    async def _drop(self, ref: LoRARef) -> str | None:
        await self.registry.drained(ref.lora_id)
        fault: str | None = None
        for _ in range(RETRIES):
            fault = await self._tell_schedulers(
                UnloadLoRAAdapterReqInput(lora_name=ref.lora_name, lora_id=ref.lora_id)
            )
            if fault is None or STILL_RUNNING not in fault:
                break
            await asyncio.sleep(RETRY_SECONDS)
        if fault is None:
            logger.info("Adapter version %s of %s has left", ref.lora_id, ref.lora_name)
        else:
            logger.error(
                "Adapter version %s of %s could not be dropped: %s", ref.lora_id, ref.lora_name, fault
            )
        return fault

    async def _tell_schedulers(self, request: Any) -> str | None:
        """Send to every scheduler; None when all agree, else their faults in one line."""
        results = await self.manager.update_lora_adapter_communicator(request)
        faults = dict.fromkeys(str(result.error_message) for result in results if not result.success)
        return " | ".join(faults) if faults else None

    def _result(self, fault: str | None) -> LoRAUpdateOutput:
        loaded = {name: ref.lora_path for name, ref in self.registry.get_all_adapters().items()}
        return LoRAUpdateOutput(success=fault is None, error_message=fault or "", loaded_adapters=loaded)

    async def answer(self, operation: Awaitable[LoRAUpdateOutput]) -> LoRAUpdateOutput:
        """The operation's result; a fault becomes the unsuccessful result that SGLang answers with 400."""
        try:
            return await operation
        except (AdapterError, NameFault) as error:
            return self._result(str(error))


def _can_be_read(current: LoRARef, path: str) -> bool:
    """Whether a version that is loaded needs no new folder: ``path`` is its own, its own is there, or it has none."""
    own = current.lora_path
    return own in (path, None, "__tensor__") or Path(own).expanduser().is_dir()


# -- hooks ----------------------------------------------------------------------------------------


def install(result: None, manager: TokenizerManager) -> None:
    """AFTER ``TokenizerManager.init_lora``: versions instead of names decide from here on."""
    setattr(manager, _ATTRIBUTE, AdapterLifecycle(manager, list(get_lora().lora_paths or ())))


def _of(manager: TokenizerManager) -> AdapterLifecycle:
    manager.auto_create_handle_loop()
    lifecycle: AdapterLifecycle = getattr(manager, _ATTRIBUTE)
    return lifecycle


async def load_lora_adapter(
    original: Any,
    manager: TokenizerManager,
    obj: LoadLoRAAdapterReqInput,
    request: fastapi.Request | None = None,
) -> LoRAUpdateOutput:
    """AROUND ``TokenizerControlMixin.load_lora_adapter``: checked, versioned, and without a global lock."""
    lifecycle = _of(manager)
    return await lifecycle.answer(lifecycle.load_folder(obj))


async def load_lora_adapter_from_tensors(
    original: Any,
    manager: TokenizerManager,
    obj: LoadLoRAAdapterFromTensorsReqInput,
    request: fastapi.Request | None = None,
) -> LoRAUpdateOutput:
    """AROUND ``TokenizerControlMixin.load_lora_adapter_from_tensors``: as above; only tensors are unpickled.

    ``Engine`` calls without an HTTP request, from the process that made the tensors.
    """
    lifecycle = _of(manager)
    return await lifecycle.answer(lifecycle.load_tensors(obj, same_process=request is None))


async def unload_lora_adapter(
    original: Any,
    manager: TokenizerManager,
    obj: UnloadLoRAAdapterReqInput,
    request: fastapi.Request | None = None,
) -> LoRAUpdateOutput:
    """AROUND ``TokenizerControlMixin.unload_lora_adapter``: waits for this adapter's requests only."""
    lifecycle = _of(manager)
    return await lifecycle.answer(lifecycle.unload(obj.lora_name))
