"""Azure's LLM inference traces: ``TIMESTAMP,ContextTokens,GeneratedTokens``, one request a line, in order of time.

Requests have no content and no users: each is a session of one turn that shares nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from elora_sglang.eval.workloads.columns import count, rows, seconds
from elora_sglang.eval.workloads.file import bad
from elora_sglang.eval.workloads.model import Piece, Session, Turn

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def sessions(path: Path) -> Iterator[tuple[Session, None]]:
    """The requests as sessions, without adapters; holds one line in memory, so a week's trace streams.

    ``at`` in seconds after the first request. An answer of 0 tokens counts as 1. Raises :class:`WorkloadError` on
    the first bad line, and where time goes back.
    """
    first = last = None
    for number, (line, row) in enumerate(rows(path)):
        at = seconds(row[COLUMNS[0]], "s", path, line)
        prompt = count(row[COLUMNS[1]], COLUMNS[1], path, line, 1)
        answer = max(1, count(row[COLUMNS[2]], COLUMNS[2], path, line, 0))
        if first is None or last is None:
            first = last = at
        if at < last:
            raise bad(path, line, "the time goes back", "sort the lines by it")
        last = at
        turn = Turn(0, (Piece(2 * number, prompt),), Piece(2 * number + 1, answer), at=round(at - first, 6))
        yield Session(str(number), None, (turn,)), None
