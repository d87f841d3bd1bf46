"""``gen``, ``gen_int``, ``gen_string`` and ``select`` take ``lora_path``; the expression carries it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sglang.lang.ir import SglExprList, SglGen, SglSelect

from elora_sglang.frontend.adapters import LoraPath, check


def with_lora_path(
    original: Callable[..., Any], *args: Any, lora_path: LoraPath = None, **kwargs: Any
) -> SglGen | SglSelect:
    """AROUND ``gen`` and its kin: the same expression, with ``lora_path`` when one is given."""
    lora_path = check(lora_path, f"sgl.{original.__name__}")
    expression = original(*args, **kwargs)
    if lora_path is not None:
        expression.lora_path = lora_path
    return expression


def calls(expression: Any) -> Iterator[SglGen | SglSelect]:
    """The ``gen`` and ``select`` expressions inside ``expression``, in order."""
    if isinstance(expression, SglExprList):
        for part in expression.expr_list:
            yield from calls(part)
    elif isinstance(expression, (SglGen, SglSelect)):
        yield expression
