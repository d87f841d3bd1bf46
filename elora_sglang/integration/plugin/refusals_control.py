"""What ``--elora`` refuses while serving: replacing the base weights, and giving the pool's memory away.

KV and adapters of one pool belong to one set of base weights, and adapters live in the memory that would be
released. SGLang has no flag for these, only endpoints, so they are refused where the tokenizer process
receives them: HTTP 400 with the line below, no request disturbed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WEIGHTS = (
    "base weights cannot be replaced while serving with --elora; start the server again on the new model"
)
MEMORY = "memory cannot be released or resumed with --elora, adapters live in it; stop the server instead"


async def update_weights(
    original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any
) -> tuple[bool, str]:
    """AROUND ``update_weights_from_{distributed,tensor,ipc}`` and ``begin_weight_update``."""
    return False, WEIGHTS


async def update_weights_from_disk(
    original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any
) -> tuple[bool, str, int]:
    """AROUND ``update_weights_from_disk``, which also reports how many requests it paused."""
    return False, WEIGHTS, 0


async def occupy_memory(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> None:
    """AROUND ``release_memory_occupation`` and ``resume_memory_occupation``; SGLang answers with the text."""
    raise ValueError(MEMORY)
