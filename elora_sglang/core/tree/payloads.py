"""What the tree asks of payloads: the runtime's names for a node's slots, opaque to the tree."""

from __future__ import annotations

from typing import Any, Protocol


class PayloadOps(Protocol):
    """Slices and splits payloads. One payload stands for ``size`` slots in token order."""

    def slice(self, payload: Any, start: int, stop: int) -> Any:
        """The payload of tokens ``[start, stop)``; owns its memory, does not mutate ``payload``."""
        ...

    def split(self, payload: Any, at: int) -> tuple[Any, Any]:
        """The payloads of tokens ``[0, at)`` and ``[at, size)``."""
        ...
