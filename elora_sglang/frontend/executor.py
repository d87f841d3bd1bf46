"""The executor of a program: which adapter each of its requests is for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elora_sglang.frontend.adapters import BASE, RUNNING, USED, adapter_for, default_of
from elora_sglang.frontend.backends import require_adapters
from elora_sglang.frontend.expressions import calls

_SPECULATED_BY = "lora_path_speculated_by"


def submit(original: Callable[..., None], executor: Any, expression: Any) -> None:
    """AROUND ``StreamExecutor.submit``: a backend without adapters is an error at the program's own line."""
    for call in calls(expression):
        require_adapters(executor.backend, getattr(call, "lora_path", None))
    original(executor, expression)


def execute(original: Callable[..., None], executor: Any, call: Any) -> None:
    """AROUND the execution of one ``gen`` or ``select``: its requests go to the adapter that it names.

    Expressions of a state are executed one after the other, so the executor can carry the answer.
    """
    asked = getattr(call, "lora_path", None)
    if asked is None:
        asked = default_of(executor, executor.backend)
    setattr(executor, RUNNING, BASE if asked is None else asked)
    try:
        adapter = adapter_for(executor, executor.backend)
        if executor.speculated_text and getattr(executor, _SPECULATED_BY, None) != adapter:
            executor.speculated_text = ""  # the words of another adapter
        original(executor, call)
        setattr(executor, _SPECULATED_BY, adapter)
        if adapter is not None:
            setattr(executor, USED, adapter)
    finally:
        setattr(executor, RUNNING, None)


def fork(original: Callable[..., list[Any]], executor: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """AROUND ``StreamExecutor.fork``: the forks know the adapter that answered last, as the parent does."""
    forks = original(executor, *args, **kwargs)
    for child in forks:
        setattr(child, USED, getattr(executor, USED, None))
    return forks


def join(original: Callable[..., None], executor: Any, expression: Any) -> None:
    """AROUND the join that concatenates KV on the server.

    That request names no adapter, and KV of one adapter is of no use to another: where adapters took part,
    the text is concatenated instead, which gives the same state.
    """
    states = [executor, *(state.stream_executor for state in expression.states)]
    for state in states[1:]:
        state.sync()
    if any(adapter_for(state, state.backend) is not None for state in states):
        executor._execute_concatenate_and_append_text(expression)
    else:
        original(executor, expression)
