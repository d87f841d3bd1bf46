"""Any object as plain tuples, for a name of the state: attributes, items, nodes by their number."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from elora_sglang.core.tree.node import Node


def freeze(value: Any, number: Callable[[Node], int], skipped: tuple[object, ...]) -> Any:
    """What ``value`` says, as tuples that ``marshal`` takes; ``skipped`` objects say nothing."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if any(value is one for one in skipped) or callable(value):
        return None
    if isinstance(value, Node):
        return ("node", number(value))

    def go(inner: Any) -> Any:
        return freeze(inner, number, skipped)

    if isinstance(value, dict):
        return tuple((go(key), go(item)) for key, item in value.items())
    if isinstance(value, set | frozenset):
        return tuple(sorted((go(item) for item in value), key=repr))
    if isinstance(value, list | tuple | deque):
        return tuple(go(item) for item in value)
    said = {name: getattr(value, name, None) for kind in type(value).__mro__ for name in _slots(kind)}
    return type(value).__name__, go(said | getattr(value, "__dict__", {}))


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
