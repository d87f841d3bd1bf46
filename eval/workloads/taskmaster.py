"""Taskmaster dialogs: ``{"conversation_id": ..., "vertical": ..., "turns": [[speaker, text], ...]}`` a line.

What the user says is a turn's new content, what the assistant says then is its answer; an opening by the assistant
stands before the user's first words; words of the user that nobody answers are dropped. Lengths are words x 1.3, a
usual ratio for English. The file has no times: dialogs begin as a Poisson process, and think times are log-normal
with mean 12 s and sigma 0.7, as in :mod:`.agents`, an assumption.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elora_sglang.eval.workloads.draws import LogNormal
from elora_sglang.eval.workloads.file import bad, lines, parse
from elora_sglang.eval.workloads.model import Piece, Session, Turn, WorkloadError

TOKENS_PER_WORD = 1.3
THINK = LogNormal(12.0, 0.7, 120.0)
ADVICE = 'a line is {"conversation_id": ..., "vertical": ..., "turns": [["user", "text"], ...]}'

# Tokens of what is new, tokens of the answer.
Exchange = tuple[int, int]


def _exchanges(row: dict[str, Any], path: Path, line: int) -> list[Exchange]:
    turns = row.get("turns")
    if not isinstance(turns, list):
        raise bad(path, line, "no list of turns", ADVICE)
    exchanges: list[list[int]] = []  # words of the user, of the assistant
    before, last = 0, "assistant"  # words of the assistant before the user's first; who spoke last
    for turn in turns:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)):
            raise bad(path, line, f"{turn!r:.60} is no turn", ADVICE)
        speaker, words = turn[0].lower(), len(turn[1].split())
        if speaker not in ("user", "assistant"):
            raise bad(path, line, f"speaker {turn[0]!r:.60}", "only user and assistant are known")
        if speaker == "user" and (last == "assistant" or not exchanges):
            exchanges.append([before, 0])
            before = 0
        if exchanges:
            exchanges[-1][speaker == "assistant"] += words
        else:
            before += words
        last = speaker
    return [(_tokens(new), _tokens(answer)) for new, answer in exchanges if answer]


def _tokens(words: int) -> int:
    return max(1, round(TOKENS_PER_WORD * words))


def dialogs(path: Path) -> list[tuple[str, list[Exchange]]]:
    """(vertical, exchanges) of every dialog with an answer; raises :class:`WorkloadError` on the first bad line."""
    found = []
    for line, text in lines(path):
        row = parse(path, line, text)
        if exchanges := _exchanges(row, path, line):
            found.append((str(row.get("vertical", "")), exchanges))
    return found


def sessions(path: Path, rate: float, duration_s: float | None, seed: int) -> Iterator[tuple[Session, str]]:
    """The dialogs as sessions with their verticals, in the file's order; holds the file in memory.

    ``rate``: turns a second on average. ``duration_s``: play them for as long, again from the start (as other
    content) where they do not suffice; None plays each once. Raises :class:`WorkloadError` on the first bad line.
    """
    if not 0 < rate < float("inf") or not (duration_s is None or 0 < duration_s < float("inf")):
        raise WorkloadError(f"rate and duration must be above 0, got {rate} a second for {duration_s} s")
    played = dialogs(path)
    if not played:
        raise WorkloadError(f"{path}: no dialog with an answer; is this the right file?")
    mean_turns = sum(len(exchanges) for _, exchanges in played) / len(played)
    clock = random.Random(f"taskmaster/{seed}")
    at, number, piece = clock.expovariate(rate / mean_turns), 0, 0
    while at < duration_s if duration_s is not None else number < len(played):
        vertical, exchanges = played[number % len(played)]
        rng = random.Random(f"taskmaster/{seed}/{number}")
        turns = []
        for turn, (new, answer) in enumerate(exchanges):
            when = (round(THINK.draw(rng), 6), None) if turn else (None, round(at, 6))
            turns.append(Turn(2 * turn, (Piece(piece, new),), Piece(piece + 1, answer), *when))
            piece += 2
        yield Session(str(number), None, tuple(turns)), vertical
        number += 1
        at += clock.expovariate(rate / mean_turns)
