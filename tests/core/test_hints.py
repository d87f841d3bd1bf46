"""Session hints: what is understood, what is refused, and what is left to others."""

from __future__ import annotations

from typing import Any

import pytest

from elora_sglang.core.hints import Hints, parse_hints


@pytest.mark.parametrize(
    ("given", "hints"),
    [
        ({}, Hints()),
        ({"thinking_budget": 5, "__req__": object()}, Hints()),
        ({"session_id": "chat-7"}, Hints(session="chat-7")),
        ({"session_end": True, "session_id": None}, Hints(session_end=True)),
        ({"session_end": False, "expect_return_s": 3}, Hints(expect_return_s=3.0)),
        ({"expect_return_s": 0}, Hints(expect_return_s=0.0)),
        ({"expect_return_s": 2.5, "other": 1}, Hints(expect_return_s=2.5)),
    ],
)
def test_understood(given: dict[str, Any], hints: Hints) -> None:
    assert parse_hints(given) == hints


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"session_id": ""}, "session_id must be a string of 1 to 256 characters, got ''"),
        ({"session_id": 7}, "session_id must be a string of 1 to 256 characters, got 7"),
        ({"session_id": "x" * 257}, "session_id must be a string of 1 to 256 characters, got 'xxx"),
        ({"session_end": "yes"}, "session_end must be true or false, got 'yes'"),
        ({"session_end": 1}, "session_end must be true or false, got 1"),
        ({"expect_return_s": "3"}, "expect_return_s must be a number of seconds, 0 or more, got '3'"),
        ({"expect_return_s": True}, "expect_return_s must be a number of seconds, 0 or more, got True"),
        ({"expect_return_s": -1}, "expect_return_s must be a number of seconds, 0 or more, got -1"),
        (
            {"expect_return_s": float("nan")},
            "expect_return_s must be a number of seconds, 0 or more, got nan",
        ),
        (
            {"expect_return_s": float("inf")},
            "expect_return_s must be a number of seconds, 0 or more, got inf",
        ),
        (
            {"session_end": True, "expect_return_s": 3},
            "session_end and expect_return_s contradict each other",
        ),
    ],
)
def test_refused(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_hints(given)
    assert str(caught.value).startswith(line)
    assert len(str(caught.value)) < 120 and "\n" not in str(caught.value)
