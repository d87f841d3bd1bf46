"""What a client may say about its session. A wrong hint costs speed, never correctness."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

_LONGEST_ID = 256
_LONGEST_WAIT_S = 7 * 24 * 3600.0


@dataclasses.dataclass(frozen=True)
class Hints:
    """Hints of one request.

    Attributes:
        session: the client's name of the session; requests with the same name belong together.
        session_end: no request of this session will follow.
        expect_return_s: the next request of this session is expected about so many seconds after this one's end.
    """

    session: str | None = None
    session_end: bool = False
    expect_return_s: float | None = None


def parse_hints(mapping: Mapping[str, object] | None) -> Hints:
    """Hints out of a request's custom parameters; other keys belong to somebody else and are ignored.

    Keys: ``session_id``, ``session_end``, ``expect_return_s``. ``None`` means not given.

    Raises:
        ValueError: one line that names the key and what it must be.
    """
    if mapping is None:
        return Hints()
    session = mapping.get("session_id")
    if session is not None and (not isinstance(session, str) or not 0 < len(session) <= _LONGEST_ID):
        raise ValueError(f"session_id must be a text of 1 to {_LONGEST_ID} characters, got {_shown(session)}")
    end = mapping.get("session_end")
    if end is not None and not isinstance(end, bool):
        raise ValueError(f"session_end must be true or false, got {_shown(end)}")
    wait = mapping.get("expect_return_s")
    if wait is not None:
        if isinstance(wait, bool) or not isinstance(wait, int | float) or not math.isfinite(wait):
            raise ValueError(f"expect_return_s must be a number of seconds, got {_shown(wait)}")
        if not 0 <= wait <= _LONGEST_WAIT_S:
            raise ValueError(f"expect_return_s must be from 0 to {_LONGEST_WAIT_S:.0f} seconds, got {wait!r}")
        if end:
            raise ValueError("session_end and expect_return_s contradict each other; give one of them")
    return Hints(session, bool(end), None if wait is None else float(wait))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
