"""Backends: a default adapter, and how a request names its adapter on the wire.

``RuntimeEndpoint`` speaks SGLang's native API and sends ``lora_path``. ``OpenAI`` sends SGLang's spelling
``BASE:ADAPTER`` as the model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sglang.lang.backend import openai as openai_backend
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from elora_sglang.frontend.adapters import LoraPath, adapter_for, check

# Adapter of the gens that API speculation keeps back until the role ends; absent when none is kept back.
_KEPT_BACK = "lora_path_kept_back"


def require_adapters(backend: Any, lora_path: Any) -> None:
    """Raise ValueError, one line, when ``backend`` cannot send requests to the adapter ``lora_path``."""
    if not isinstance(lora_path, str) or isinstance(backend, RuntimeEndpoint):
        return
    problem = ""
    if not isinstance(backend, openai_backend.OpenAI):
        problem = f"the backend {type(backend).__name__} knows no adapters"
    elif not _is_sglang(backend.client):
        problem = f"the OpenAI backend talks to {backend.client.base_url.host}, which has no SGLang adapters"
    elif ":" in backend.model_name:
        problem = f"the OpenAI backend's model {backend.model_name!r} names an adapter already"
    if problem:
        raise ValueError(
            f"lora_path={lora_path!r}: {problem}; use RuntimeEndpoint(URL), or OpenAI with the base model's "
            "name and base_url=URL/v1 of an SGLang server"
        )


def _is_sglang(client: Any) -> bool:
    """False for clients that surely talk to somebody else: Azure and OpenAI itself."""
    azure = isinstance(client, openai_backend.openai.AzureOpenAI)
    return not azure and client.base_url.host != "api.openai.com"


def with_default(
    original: Callable[..., None], backend: Any, *args: Any, lora_path: LoraPath = None, **kwargs: Any
) -> None:
    """AROUND a backend's constructor: keeps ``lora_path`` as the default of all programs that run on it."""
    lora_path = check(lora_path, type(backend).__name__)
    original(backend, *args, **kwargs)
    require_adapters(backend, lora_path)
    if lora_path is not None:
        backend.lora_path = lora_path


def add_lora_path(original: Callable[..., None], backend: Any, executor: Any, data: dict[str, Any]) -> None:
    """AROUND ``RuntimeEndpoint._add_images``, the last step of every payload: adds ``lora_path`` to ``data``."""
    original(backend, executor, data)
    adapter = adapter_for(executor, backend)
    if adapter is not None:
        data["lora_path"] = adapter


def openai_call(original: Callable[..., Any], backend: Any, executor: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND a method of ``OpenAI`` that sends its request at once."""
    return original(_for_adapter(backend, adapter_for(executor, backend)), executor, *args, **kwargs)


def openai_generate(
    original: Callable[..., Any], backend: Any, executor: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND ``OpenAI.generate``. With API speculation on a chat model the request goes out at the role's end.

    Raises ValueError when two gens of one such role ask for different adapters: they share the request.
    """
    if not backend.is_chat_model or executor.num_api_spec_tokens is None:
        return openai_call(original, backend, executor, *args, **kwargs)
    adapter = adapter_for(executor, backend)
    earlier = vars(executor).setdefault(_KEPT_BACK, adapter)
    if earlier != adapter:
        raise ValueError(
            f"lora_path={adapter!r}: an earlier gen of this role goes to {earlier!r}, and num_api_spec_tokens "
            "sends one request for the whole role; use one adapter per role"
        )
    return original(backend, executor, *args, **kwargs)


def openai_role_end(original: Callable[..., None], backend: Any, executor: Any) -> None:
    """AROUND ``OpenAI.role_end_generate``: the request kept back goes to the adapter of its gens."""
    speaker = _for_adapter(backend, vars(executor).pop(_KEPT_BACK, None))
    original(speaker, executor)
    if speaker is not backend:  # the call has put fresh objects in place of these
        backend.spec_kwargs, backend.spec_format = speaker.spec_kwargs, speaker.spec_format


def _for_adapter(backend: Any, adapter: str | None) -> Any:
    """``backend``, or a copy that sends its requests to an adapter.

    A copy, because programs of one backend run in many threads. Its ``model_name`` stays: SGLang reads from
    it which parameters the model takes.
    """
    if adapter is None:
        return backend
    speaker = copy.copy(backend)
    model = f"{backend.model_name}:{adapter}"
    speaker.client = SimpleNamespace(
        completions=_TextCompletions(backend.client.completions, model),
        chat=SimpleNamespace(completions=_Completions(backend.client.chat.completions, model)),
    )
    return speaker


class _Completions:
    """The ``create`` of an OpenAI client, always for ``model``."""

    def __init__(self, completions: Any, model: str) -> None:
        self._completions = completions
        self._model = model

    def create(self, **kwargs: Any) -> Any:
        return self._completions.create(**{**kwargs, "model": self._model})


class _TextCompletions(_Completions):
    """Without the parameter of chats that SGLang's backend passes when it streams, and the client refuses."""

    def create(self, **kwargs: Any) -> Any:
        kwargs.pop("max_completion_tokens", None)
        return super().create(**kwargs)
