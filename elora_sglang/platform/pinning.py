"""Without an accelerator there is nothing to pin host memory for, and asking for it is an error.

SGLang's LoRA code pins unconditionally. The hooks below run those few functions with pinning left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class NoPinning(TorchFunctionMode):
    """While active, ``pin_memory=True`` is dropped from torch calls and ``Tensor.pin_memory()`` returns its tensor."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        if kwargs and "pin_memory" in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        return func(*args, **(kwargs or {}))


def without_pinning(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """AROUND hook: the original, with pinning left out."""
    with NoPinning():
        return original(*args, **kwargs)
