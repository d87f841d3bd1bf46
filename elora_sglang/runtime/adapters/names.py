"""Which adapter a request means. One rule per spelling; the table for people is ``docs/adapters.md``."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import TypeAlias

from fastapi import HTTPException

#: SGLang's default of the OpenAI ``model`` field: the base model.
DEFAULT_MODEL_NAME = "default"

#: How many loaded names an error about an unknown one lists.
NEAREST = 5

LoraPath: TypeAlias = "str | list[str | None] | None"


class NameFault(HTTPException, ValueError):
    """A request whose adapter name cannot be served. Every SGLang API answers it as a client error.

    It is a ValueError for the native API, which asks it for ``status_code``, and an HTTPException for
    the OpenAI one, which would answer a plain ValueError with 400.

    Attributes:
        status_code: 404 for an unknown name, 400 for a contradiction.
        detail: one line.
        param: the request field at fault.
    """

    def __init__(self, status_code: int, message: str, param: str) -> None:
        HTTPException.__init__(self, status_code=status_code, detail=message)
        ValueError.__init__(self, message)
        self.param = param

    def __str__(self) -> str:
        return str(self.detail)


def nearest(name: str, loaded: Collection[str]) -> list[str]:
    """At most five loaded names, most similar first; ties keep the alphabetical order."""
    return difflib.get_close_matches(name, sorted(loaded), n=NEAREST, cutoff=0.0)


def unknown_adapter(name: str, loaded: Collection[str], param: str = "lora_path") -> NameFault:
    """The 404 for an adapter name that is not loaded."""
    close = ", ".join(nearest(name, loaded))
    have = f"nearest loaded: {close}" if close else "no adapter is loaded"
    return NameFault(404, f"Unknown adapter {name!r}; {have}. Load it with POST /load_lora_adapter.", param)


def unknown_model(name: str, served: str, loaded: Collection[str]) -> NameFault:
    """The 404 for a model name that is neither the base model nor an adapter."""
    close = ", ".join(nearest(name, loaded))
    have = f"nearest loaded adapters: {close}" if close else "no adapter is loaded"
    return NameFault(404, f"Unknown model {name!r}; the base model is {served!r}, {have}.", "model")


def adapter_of_model(model: str, served: str, loaded: Collection[str]) -> str | None:
    """Adapter that the ``model`` field names: ``BASE:NAME`` or a bare ``NAME``; None for the base model.

    Raises:
        NameFault: 404, the name is neither the base model's nor a loaded adapter's.
    """
    if model in ("", served, DEFAULT_MODEL_NAME):
        return None
    for base in (served, DEFAULT_MODEL_NAME):
        if model.startswith(f"{base}:"):
            name = model[len(base) + 1 :].strip()
            if name not in loaded:
                raise unknown_adapter(name, loaded, "model")
            return name
    if model not in loaded:
        raise unknown_model(model, served, loaded)
    return model


def resolve(model: str, lora_path: LoraPath, served: str, loaded: Collection[str]) -> LoraPath:
    """The ``lora_path`` that a request with both fields means; existence of ``lora_path`` names included.

    Args:
        model: the ``model`` field; ``lora_path``: that field, a name, one per prompt, or None.
        served: the server's ``served_model_name``; ``loaded``: names of the loaded adapters.

    Raises:
        NameFault: 404 for an unknown name, 400 when the two fields name different adapters.
    """
    rows = [lora_path] if isinstance(lora_path, str) else list(lora_path or ())
    for name in rows:
        if name and name not in loaded:
            raise unknown_adapter(name, loaded)
    from_model = adapter_of_model(model, served, loaded)
    if from_model is None:
        return lora_path
    if rows and (len(rows) > 1 or rows[0]):
        for name in rows:
            if name != from_model:
                raise NameFault(
                    400,
                    f"model names the adapter {from_model!r} and lora_path names {name!r}; "
                    "send one of them, or the same name in both.",
                    "lora_path",
                )
        return lora_path
    return from_model


def check_new_name(name: str, served: str) -> str | None:
    """What is wrong with ``name`` as the name of a new adapter, or None."""
    if not name or name != name.strip():
        return "is empty or has blanks at an end"
    if name in (served, DEFAULT_MODEL_NAME):
        return "is a name of the base model"
    if name.startswith((f"{served}:", f"{DEFAULT_MODEL_NAME}:")):
        return "reads like BASE:NAME"
    return None
