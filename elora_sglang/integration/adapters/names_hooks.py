"""The naming rules of :mod:`elora_sglang.runtime.adapters.names` put into SGLang's APIs.

Chat completions, completions, embeddings and Anthropic messages serve adapters; all other APIs that take
a model name compute with the base model, so an adapter's name there is an error instead of a wrong answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from sglang.srt.entrypoints.ollama.serving import OllamaServing
from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from sglang.srt.utils.json_response import orjson_response

from elora_sglang.integration.plugin import config
from elora_sglang.runtime.adapters.names import LoraPath, NameFault, adapter_of_model, resolve

if TYPE_CHECKING:
    from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase
    from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
    from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

#: Requests whose handlers pass ``lora_path`` on.
_SERVES_ADAPTERS = (ChatCompletionRequest, CompletionRequest, EmbeddingRequest)

#: Requests whose answer is the same for every adapter.
_SAME_FOR_ALL = (TokenizeRequest, DetokenizeRequest)

#: Tag that Ollama clients append to a model name without one.
_OLLAMA_TAG = ":latest"


def _strict(manager: TokenizerManager) -> bool:
    return config.current(manager.server_args).adapter_names == "strict"


def resolve_lora_path(
    original: Callable[..., LoraPath],
    serving: OpenAIServingBase,
    request_model: str,
    explicit_lora_path: LoraPath,
) -> LoraPath:
    """AROUND ``OpenAIServingBase._resolve_lora_path``. Raises NameFault (404 or 400)."""
    manager = serving.tokenizer_manager
    if not _strict(manager):
        return original(serving, request_model, explicit_lora_path)
    return resolve(
        request_model or "", explicit_lora_path, manager.served_model_name, manager.lora_registry.names
    )


async def handle_request(
    original: Callable[..., Awaitable[Any]], serving: OpenAIServingBase, request: Any, raw_request: Any
) -> Any:
    """AROUND ``OpenAIServingBase.handle_request``: a wrong name is answered before any work is done."""
    manager = serving.tokenizer_manager
    if _strict(manager) and not isinstance(request, _SAME_FOR_ALL):
        try:
            meant = resolve(
                getattr(request, "model", None) or "",
                getattr(request, "lora_path", None),
                manager.served_model_name,
                manager.lora_registry.names,
            )
            if meant and not isinstance(request, _SERVES_ADAPTERS):
                raise _not_served(meant, raw_request.url.path if raw_request is not None else "this API")
        except NameFault as fault:
            return _error_response(serving, fault)
    return await original(serving, request, raw_request)


def validate_responses_model(
    original: Callable[..., Any], serving: OpenAIServingResponses, model: str | None
) -> Any:
    """AROUND ``OpenAIServingResponses._validate_model``: stock answers for adapters from the base."""
    if model is None or not _strict(serving.tokenizer_manager):
        return original(serving, model)
    try:
        _require_base(serving.tokenizer_manager, model, "/v1/responses")
    except NameFault as fault:
        return _error_response(serving, fault)
    return None


class EloraOllamaServing(OllamaServing):
    """SGLang's Ollama API (``entrypoints/ollama/serving.py``), which computes with the base model whatever is asked."""

    async def handle_chat(self, request: Any, raw_request: Any) -> Any:
        """An adapter's name is an error."""
        refused = _refused_by_ollama(self, request.model)
        return await super().handle_chat(request, raw_request) if refused is None else refused

    async def handle_generate(self, request: Any, raw_request: Any) -> Any:
        """An adapter's name is an error."""
        refused = _refused_by_ollama(self, request.model)
        return await super().handle_generate(request, raw_request) if refused is None else refused


def _refused_by_ollama(serving: OllamaServing, model: str) -> Any:
    """The answer that refuses an adapter's name; None for the base model."""
    manager = serving.tokenizer_manager
    if not _strict(manager):
        return None
    if model not in manager.lora_registry.names:
        model = model.removesuffix(_OLLAMA_TAG)
    try:
        _require_base(manager, model, "the Ollama API")
    except NameFault as fault:
        return orjson_response({"error": str(fault)}, status_code=fault.status_code)
    return None


def one_adapter_per_prompt(request: GenerateReqInput | EmbeddingReqInput) -> None:
    """Check ``lora_path`` of a request that SGLang has normalized. Mutates a list of one name for a single prompt.

    In stock SGLang a list for a single prompt ends the scheduler process (``schedule_batch.py``,
    ``Req.__init__``), and a list of another length than the batch is an internal error.

    Raises:
        NameFault: 400, the list does not fit the prompts.
    """
    rows = request.lora_path
    if not isinstance(rows, list):
        return
    # The lists of a batch are as long as what it expands to: prompts times samples.
    prompts = 1 if request.is_single else request.batch_size
    samples = 1 if request.is_single else getattr(request, "parallel_sample_num", 1)
    if len(rows) != prompts * samples:
        raise NameFault(
            HTTPStatus.BAD_REQUEST,
            f"lora_path has {len(rows) // samples} entries for {prompts} prompts; send one name, or one per prompt.",
            "lora_path",
        )
    if request.is_single:
        request.lora_path = rows[0]


def _require_base(manager: TokenizerManager, model: str, api: str) -> None:
    adapter = adapter_of_model(model, manager.served_model_name, manager.lora_registry.names)
    if adapter is not None:
        raise _not_served(adapter, api)


def _not_served(adapter: LoraPath, api: str) -> NameFault:
    return NameFault(
        HTTPStatus.BAD_REQUEST,
        f"{api} serves the base model only, not the adapter {adapter!r}; use /v1/chat/completions, "
        "/v1/completions or /generate.",
        "model",
    )


def _error_response(serving: OpenAIServingBase, fault: NameFault) -> Any:
    kind = "NotFoundError" if fault.status_code == HTTPStatus.NOT_FOUND else "BadRequestError"
    return serving.create_error_response(
        str(fault), err_type=kind, status_code=fault.status_code, param=fault.param
    )
