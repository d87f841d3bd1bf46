"""The tokenizer process with ``--elora``: SGLang's ``TokenizerManager`` (``managers/tokenizer_manager.py``).

SGLang builds it in the launcher, because ``patches/tokenizer.py`` puts it in the place of the stock class. It also
overrides what SGLang keeps in ``TokenizerControlMixin`` (``managers/tokenizer_control_mixin.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.runtime_context import get_lora

from elora_sglang.integration.adapters import messages
from elora_sglang.integration.adapters.names_hooks import one_adapter_per_prompt
from elora_sglang.integration.adapters.registry import VersionedRegistry
from elora_sglang.integration.adapters.tokenizer_side import AdapterLifecycle
from elora_sglang.integration.cache import session_hints
from elora_sglang.integration.plugin import config, counter
from elora_sglang.integration.plugin.refusals_control import MEMORY, WEIGHTS
from elora_sglang.integration.plugin.verify import Refused, name_of

if TYPE_CHECKING:
    import fastapi
    from sglang.srt.managers.io_struct import (
        EmbeddingReqInput,
        LoadLoRAAdapterFromTensorsReqInput,
        LoadLoRAAdapterReqInput,
        LoRAUpdateOutput,
        UnloadLoRAAdapterReqInput,
    )


#: Further classes of ours that SGLang calls in the tokenizer process, by the name under which calls are counted.
WATCHED: dict[str, type] = {"lora_registry": VersionedRegistry}


def at_tokenizer_start(result: tuple[Any, ...], engine: type, server_args: Any, **kwargs: Any) -> None:
    """AFTER ``Engine._launch_subprocesses``: the tokenizer manager that was built is ELORA's.

    There is none on the further nodes of a server. Raises Refused.
    """
    manager = result[0]
    if config.current(server_args).enabled and not isinstance(manager, EloraTokenizerManager | None):
        raise Refused(
            f"the tokenizer manager is {name_of(type(manager))}, not EloraTokenizerManager; remove the plugin "
            "or launcher that brings its own"
        )


class EloraTokenizerManager(TokenizerManager):
    """Names lead to versions of adapters, and what ``--elora`` cannot do while serving is refused."""

    lora_registry: VersionedRegistry

    # -- adapters -------------------------------------------------------------------------------------------

    def init_lora(self) -> None:
        """Versions instead of names decide. Stock would load an unloaded name again on its next request."""
        super().init_lora()
        messages.announce()
        for name, ours in WATCHED.items():
            counter.watch(name, ours)
        self.adapter_lifecycle = AdapterLifecycle(self, list(get_lora().lora_paths or ()))

    async def load_lora_adapter(
        self, obj: LoadLoRAAdapterReqInput, request: fastapi.Request | None = None
    ) -> LoRAUpdateOutput:
        """Loads or replaces from a folder that was checked. Does not call the stock method, which locks all names."""
        self.auto_create_handle_loop()
        lifecycle = self.adapter_lifecycle
        return await lifecycle.answer(lifecycle.load_folder(obj))

    async def load_lora_adapter_from_tensors(
        self, obj: LoadLoRAAdapterFromTensorsReqInput, request: fastapi.Request | None = None
    ) -> LoRAUpdateOutput:
        """The same for tensors in the request; nothing but tensors is unpickled.

        ``Engine`` calls without an HTTP request, from the process that made the tensors.
        """
        self.auto_create_handle_loop()
        lifecycle = self.adapter_lifecycle
        return await lifecycle.answer(lifecycle.load_tensors(obj, same_process=request is None))

    async def unload_lora_adapter(
        self, obj: UnloadLoRAAdapterReqInput, request: fastapi.Request | None = None
    ) -> LoRAUpdateOutput:
        """Waits for this adapter's own requests, and blocks nobody else."""
        self.auto_create_handle_loop()
        lifecycle = self.adapter_lifecycle
        return await lifecycle.answer(lifecycle.unload(obj.lora_name))

    # -- requests -------------------------------------------------------------------------------------------

    def _init_req_state(
        self, obj: GenerateReqInput | EmbeddingReqInput, request: fastapi.Request | None = None
    ) -> None:
        """Checks what only ELORA knows of a request that SGLang has just normalized. May mutate ``obj.lora_path``.

        Raises:
            NameFault: 400, ``lora_path`` does not fit the prompts.
            ValueError: a malformed session hint, which SGLang's APIs answer with status 400.
        """
        one_adapter_per_prompt(obj)
        if isinstance(obj, GenerateReqInput):
            session_hints.check_request(obj)
        super()._init_req_state(obj, request)

    async def _validate_and_resolve_lora(self, obj: GenerateReqInput | EmbeddingReqInput) -> None:
        """Only a name leads to an adapter. ``lora_id`` is a field of the request body, and stock hands it on."""
        if not obj.lora_path:
            obj.lora_id = None
        await super()._validate_and_resolve_lora(obj)

    # -- refused while serving ------------------------------------------------------------------------------
    # These do not call the stock methods. SGLang answers what they return, or raise, with status 400.

    async def update_weights_from_disk(self, *args: Any, **kwargs: Any) -> tuple[bool, str, int]:
        """Refused; the number is that of paused requests."""
        return False, WEIGHTS, 0

    async def update_weights_from_distributed(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        """Refused."""
        return False, WEIGHTS

    async def update_weights_from_tensor(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        """Refused."""
        return False, WEIGHTS

    async def update_weights_from_ipc(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        """Refused."""
        return False, WEIGHTS

    async def begin_weight_update(self, *args: Any, **kwargs: Any) -> tuple[bool, str]:
        """Refused."""
        return False, WEIGHTS

    async def release_memory_occupation(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused. Raises ValueError."""
        raise ValueError(MEMORY)

    async def resume_memory_occupation(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused. Raises ValueError."""
        raise ValueError(MEMORY)
