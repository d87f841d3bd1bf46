"""What a request says about the session it belongs to: hints that save time and never change a result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Longest session id in characters; it is kept in memory for as long as its session is cached.
MAX_SESSION_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class Hints:
    """Session hints of one request; the defaults say nothing.

    Attributes:
        session: id that the requests of one conversation share.
        session_end: the conversation ends with this request's answer.
        expect_return_s: seconds after this request's answer in which the next one of the conversation is expected.
    """

    session: str | None = None
    session_end: bool = False
    expect_return_s: float | None = None


def parse_hints(parameters: Mapping[str, Any]) -> Hints:
    """Hints among a request's custom parameters; other keys belong to others and are ignored. Pure.

    Raises:
        ValueError: a hint of the wrong type or range, in one line that names it.
    """
    session = parameters.get("session_id")
    if session is not None and (
        not isinstance(session, str) or not 0 < len(session) <= MAX_SESSION_CHARACTERS
    ):
        raise ValueError(
            f"session_id must be a string of 1 to {MAX_SESSION_CHARACTERS} characters, got {_short(session)}"
        )
    end = parameters.get("session_end")
    if end is not None and not isinstance(end, bool):
        raise ValueError(f"session_end must be true or false, got {_short(end)}")
    expected = parameters.get("expect_return_s")
    if expected is not None:
        number = isinstance(expected, int | float) and not isinstance(expected, bool)
        if not number or not 0 <= expected < math.inf:
            raise ValueError(
                f"expect_return_s must be a number of seconds, 0 or more, got {_short(expected)}"
            )
        if end:
            raise ValueError("session_end and expect_return_s contradict each other; send one of them")
    return Hints(session, bool(end), None if expected is None else float(expected))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
