"""Programs: a default adapter by ``bind``, ``run`` or a row of ``run_batch``.

A function that has a parameter ``lora_path`` of its own keeps it: what is given under that name is its
argument, as without ELORA, and sets no default.
"""

from __future__ import annotations

import contextvars
import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from elora_sglang.frontend.adapters import LoraPath, check
from elora_sglang.frontend.backends import require_adapters

_KEY = "lora_path"

#: The program whose batch is being started in this context, and its rows.
BATCH: contextvars.ContextVar[tuple[Any, Sequence[dict[str, Any]]] | None] = contextvars.ContextVar(
    "elora_frontend_batch", default=None
)


def bind(original: Callable[..., Any], program: Any, **kwargs: Any) -> Any:
    """AROUND ``SglFunction.bind``: a program with ``lora_path`` as its default, which a call can override."""
    default, arguments = _take(program, kwargs, "bind")
    return _with_default(original(program, **arguments), _first(default, _default(program)))


def run_batch(
    original: Callable[..., Any], program: Any, *args: Any, lora_path: LoraPath = None, **kwargs: Any
) -> Any:
    """AROUND ``SglFunction.run_batch``: ``lora_path`` for the rows that name none themselves."""
    lora_path = check(lora_path, f"{_name(program)}.run_batch")
    return original(program if lora_path is None else _with_default(program, lora_path), *args, **kwargs)


def trace(original: Callable[..., Any], program: Any, **kwargs: Any) -> Any:
    """AROUND ``SglFunction.trace``, which hands its keywords to the function."""
    return original(program, **_take(program, kwargs, "trace")[1])


def run_program(
    original: Callable[..., Any],
    program: Any,
    backend: Any,
    positional: Any,
    keywords: dict[str, Any],
    parameters: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """AROUND ``run_program``, where ``run`` and every row of ``run_batch`` arrive.

    The default travels with the sampling parameters, which forks share. Mutates none of the arguments.
    """
    given, keywords = _take(program, keywords, "run")
    default = _first(given, _default(program))
    if default is not None:
        if backend is not None:
            require_adapters(getattr(backend, "endpoint", backend), default)
        parameters = copy.copy(parameters)
        parameters.lora_path = default
    return original(program, backend, positional, keywords, parameters, *args, **kwargs)


def run_program_batch(
    original: Callable[..., Any], program: Any, backend: Any, rows: Any, *args: Any, **kwargs: Any
) -> Any:
    """AROUND ``run_program_batch``: a fault in any row is an error before the first one runs."""
    endpoint = getattr(backend, "endpoint", backend)
    for number, row in enumerate(rows):
        given = row_default(program, row, f"run_batch, row {number}")
        if endpoint is not None:
            require_adapters(endpoint, given)
    token = BATCH.set((program, rows))
    try:
        return original(program, backend, rows, *args, **kwargs)
    finally:
        BATCH.reset(token)


def row_default(program: Any, row: dict[str, Any], where: str = "run_batch") -> LoraPath:
    """What the row, else the program says. Raises TypeError or ValueError for what is no adapter's name."""
    return _first(_take(program, row, where)[0], _default(program))


def _take(program: Any, keywords: dict[str, Any], where: str) -> tuple[LoraPath, dict[str, Any]]:
    """``lora_path`` out of a call's keywords, and the others; the same dict when there is nothing to take."""
    if _KEY not in keywords or _KEY in inspect.signature(program.func).parameters:
        return None, keywords
    rest = {key: value for key, value in keywords.items() if key != _KEY}
    return check(keywords[_KEY], f"{_name(program)}.{where}"), rest


def _default(program: Any) -> LoraPath:
    default: LoraPath = getattr(program, _KEY, None)
    return default


def _with_default(program: Any, default: LoraPath) -> Any:
    """A copy of ``program`` with that default; ``program`` itself when there is none."""
    if default is None:
        return program
    program = copy.copy(program)
    program.lora_path = default
    return program


def _first(*lora_paths: LoraPath) -> LoraPath:
    return next((path for path in lora_paths if path is not None), None)


def _name(program: Any) -> str:
    return str(getattr(program.func, "__name__", "program"))
