"""KV computed before a batch runs: the common prefix, with the adapters that will use it.

``run_batch`` traces its program, and sends the text before the first ``gen`` ahead of the rows. KV of a prompt
belongs to one adapter, so the request names it: that of the first ``gen`` if it says one, else that of the rows.
An adapter of a single row gains nothing and gets no request; nor does one that the program will only choose
while it runs.
"""

from __future__ import annotations

import contextvars
import inspect
from collections import Counter
from collections.abc import Callable
from types import CodeType, SimpleNamespace
from typing import Any

from sglang.lang.backend.base_backend import BaseBackend
from sglang.lang.ir import SglArgument, SglExpr
from sglang.lang.tracer import TracingScope

from elora_sglang.frontend.adapters import RUNNING, LoraPath, Model
from elora_sglang.frontend.expressions import calls
from elora_sglang.frontend.programs import BATCH, row_default

_Wanted = Callable[[], "list[LoraPath]"]
_WANTED: contextvars.ContextVar[_Wanted | None] = contextvars.ContextVar(
    "elora_frontend_prefix", default=None
)


def cache_program(original: Callable[..., None], program: Any, backend: Any) -> None:
    """AROUND ``cache_program``: lets :func:`cache_prefix` see the trace from which the prefix is taken."""
    batch = BATCH.get()
    rows = batch[1] if batch is not None and batch[0] is program else None
    witness = SimpleNamespace(backend=backend, child_states=[])
    token = _WANTED.set(lambda: _adapters(program, rows, witness.child_states))
    try:
        with TracingScope(witness):  # the tracer reports itself to the scope around it
            original(program, backend)
    finally:
        _WANTED.reset(token)


def cache_prefix(original: Callable[..., None], backend: Any, prefix: str) -> None:
    """AROUND ``RuntimeEndpoint.cache_prefix``: one request per adapter, the base model's as SGLang sends it."""
    wanted = _WANTED.get()
    users = Counter(_adapter(asked, backend) for asked in ([None] if wanted is None else wanted()))
    enough = min(2, users.total())
    for adapter, count in users.items():
        if count < enough:
            continue
        if adapter is None:
            original(backend, prefix)
        else:
            backend.commit_lazy_operations(SimpleNamespace(text_=prefix, images_=[], **{RUNNING: adapter}))


def _adapter(asked: LoraPath, backend: Any) -> str | None:
    if asked is None:
        asked = getattr(backend, "lora_path", None)
    return asked if isinstance(asked, str) else None


def _adapters(program: Any, rows: Any, tracers: list[Any]) -> list[LoraPath]:
    """What each row asks of its first ``gen``, None for the backend's default; one entry without rows.

    Empty when the trace shows that the program will compute the name.
    """
    rows = [{}] if rows is None else rows
    first = _first_call(tracers)
    if first is None and _says_lora_path(program.func.__code__):
        first = _trace_on(program)
        if first is None:
            return []
    asked = getattr(first, "lora_path", None)
    if asked is None:
        return [row_default(program, row) for row in rows]
    if isinstance(asked, SglArgument):
        return [path for row in rows for path in _argument(program, row, asked.name)]
    return [] if isinstance(asked, SglExpr) else [asked] * len(rows)


def _first_call(tracers: list[Any]) -> Any:
    return next((call for node in tracers[0].nodes for call in calls(node)), None) if tracers else None


def _says_lora_path(code: CodeType) -> bool:
    """Whether a function calls something with the keyword ``lora_path``: compilers keep keywords in tuples."""
    return any(
        _says_lora_path(constant)
        if isinstance(constant, CodeType)
        else isinstance(constant, tuple) and "lora_path" in constant
        for constant in code.co_consts
    )


def _trace_on(program: Any) -> Any:
    """The first ``gen`` or ``select`` behind arguments, where SGLang's trace for the prefix stops; or None.

    Runs the program's function once more with placeholders, as ``program.trace()`` does.
    """
    try:
        return _first_call([program.trace(backend=BaseBackend())])
    except Exception:  # whatever a user's function does with placeholders; SGLang's own trace ends so as well
        return None


def _argument(program: Any, row: dict[str, Any], name: str) -> list[LoraPath]:
    """What ``row`` passes as the argument ``name``: an adapter, or its default; nothing if it is neither."""
    value = row.get(name, inspect.signature(program.func).parameters[name].default)
    if value is None:
        return [row_default(program, row)]
    return [value] if isinstance(value, (str, Model)) else []
