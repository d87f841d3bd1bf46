"""Which adapter a request of a frontend program goes to.

``lora_path`` is written in three places, the nearest wins: ``gen``/``select``; the program (one row of
``run_batch``, ``run``, ``bind``); the backend. Each place keeps it in an attribute ``lora_path`` of the SGLang
object at hand, absent or None where nothing was said.
"""

from __future__ import annotations

import enum
from typing import Any, Final, TypeAlias

from sglang.lang.ir import SglExpr
from sglang.lang.tracer import TracingScope


class Model(enum.Enum):
    """What ``lora_path`` can name besides an adapter."""

    BASE = "the base model"


#: ``lora_path=BASE``: the base model, also where the program or the backend has a default adapter.
BASE: Final = Model.BASE

LoraPath: TypeAlias = "str | Model | None"

# Attributes that an executor carries for us.
RUNNING = "lora_path_running"  # what the gen or select that is running goes to, else None
USED = "lora_path_used"  # the last adapter that answered this state, or None


def check(lora_path: Any, where: str) -> LoraPath:
    """Return ``lora_path`` if it can name an adapter.

    While SGLang traces a program, arguments and variables are placeholders; they pass.

    Raises:
        TypeError: it is no string; ValueError: it is empty. One line that says where it was given.
    """
    if lora_path is None or isinstance(lora_path, Model):
        return lora_path
    if isinstance(lora_path, SglExpr) and TracingScope.get_current_scope() is not None:
        return lora_path
    advice = "give the name of a loaded adapter, or elora_sglang.frontend.BASE for the base model"
    if not isinstance(lora_path, str):
        raise TypeError(f"lora_path of {where} is {lora_path!r}, not a string; {advice}")
    if not lora_path.strip():
        raise ValueError(f"lora_path of {where} is empty; {advice}")
    return lora_path


def default_of(executor: Any, backend: Any) -> LoraPath:
    """What the program, else the backend says; None when neither says anything."""
    parameters = getattr(executor, "default_sampling_para", None)
    default: LoraPath = getattr(parameters, "lora_path", None)
    return getattr(backend, "lora_path", None) if default is None else default


def adapter_for(executor: Any, backend: Any) -> str | None:
    """Adapter of a request that ``backend`` sends now for ``executor``; None is the base model.

    Outside of ``gen`` and ``select`` SGLang only computes KV ahead (at a ``fork``). That is worth most under
    the default or, without one, under the adapter that answered last.
    """
    running: LoraPath = getattr(executor, RUNNING, None)
    if running is None:
        running = default_of(executor, backend)
    if running is None:
        running = getattr(executor, USED, None)
    return running if isinstance(running, str) else None
