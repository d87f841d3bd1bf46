"""How often each hook and each overridden member was called: for the test that drives a server through its life.

Off, and free, unless :data:`ENV_CALLS` names a file. A server's processes are killed at the end, so each appends to
that file while it counts, at the 1st, 2nd, 4th, 8th … call: one line ``NAME PID COUNT``. A hook is called by its
record's name, an overridden member ``NAME.member``.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elora_sglang.patches.base import Kind, Patch, overrides

#: Environment variable that names the file, and switches counting on.
ENV_CALLS = "ELORA_COUNT_CALLS"

_WATCHED = "_elora_watched"

_counts: Counter[str] = Counter()
_lock = threading.Lock()


def counted(patch: Patch) -> Any:
    """The record's hook; where counting is on, one that counts. Mutates the class of a hook that is a class.

    Raises ImportError or AttributeError when there is no such hook.
    """
    hook = patch.load_hook()
    file = os.environ.get(ENV_CALLS)
    if file is None or patch.kind is Kind.ATTRIBUTE:
        return (
            hook  # what an attribute's hook returns says `count` itself: a new process imports it by its name
        )
    if inspect.isclass(hook) and patch.kind is Kind.REPLACE:
        watch(patch.name, hook)
        return hook
    return _counting(patch.name, hook, file)


def watch(name: str, ours: type) -> None:
    """Count the calls of every member with which ``ours`` overrides SGLang's class; nothing where counting is off.

    Mutates ``ours``, once.
    """
    file = os.environ.get(ENV_CALLS)
    if file is None or _WATCHED in vars(ours):
        return
    for member in overrides(ours):
        setattr(ours, member, _counting(f"{name}.{member}", getattr(ours, member), file))
    setattr(ours, _WATCHED, True)


def read(file: Path) -> dict[str, int]:
    """Calls by name, over all processes: at least so many, and less than twice as many."""
    latest: dict[tuple[str, str], int] = {}
    for line in file.read_text().splitlines():
        name, pid, text = line.split()
        latest[name, pid] = int(text)
    total: Counter[str] = Counter()
    for (name, _), calls in latest.items():
        total[name] += calls
    return dict(total)


def count(name: str) -> None:
    """Count one call of ``name``; nothing where counting is off."""
    file = os.environ.get(ENV_CALLS)
    if file is not None:
        _count(name, file)


def _counting(name: str, function: Callable[..., Any], file: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _count(name, file)
        return function(*args, **kwargs)

    return call


def _count(name: str, file: str) -> None:
    with _lock:
        _counts[name] += 1
        count = _counts[name]
    if count & (count - 1) == 0:
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(f"{name} {os.getpid()} {count}\n")
