"""What a workload is: sessions of turns, in pieces of content, one adapter per session.

No text and no token ids: a *piece* stands for some content of a known length, and two prompts share what their
pieces share. So a workload of 10^5 requests streams in little memory and fits every tokenizer and model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VERSION = 1
# Ids of pieces and seeds of hashes are packed into 64 bits, signed.
MAX_ID = 2**63 - 1


class WorkloadError(ValueError):
    """One line: what is wrong, where, what to do."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Content that is the same wherever the same ``id`` stands at the same offset of a prompt.

    ``id``: -2^63 to 2^63 - 1. ``tokens``: length, at least 1; a shorter piece of one id is the start of a longer.
    """

    id: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a session.

    Its prompt is the first ``keep`` pieces of the session's context (the last prompt and its answer) and then
    ``new``. It arrives ``think`` seconds after the previous answer ended (closed loop), or ``at`` seconds after the
    workload's start (open loop): exactly one is given, and a session's first turn has ``at``.
    """

    keep: int
    new: tuple[Piece, ...]
    answer: Piece
    think: float | None = None
    at: float | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """Turns of one user with one adapter. ``adapter``: index in the header's list, None for the base model."""

    id: str
    adapter: int | None
    turns: tuple[Turn, ...]

    @property
    def start(self) -> float:
        """Seconds from the workload's start to the first arrival; raises ValueError if it has none."""
        at = self.turns[0].at if self.turns else None
        if at is None:
            raise ValueError(f"session {self.id}: the first turn has no arrival time")
        return at


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: its name and its LoRA rank."""

    name: str
    rank: int


@dataclass(frozen=True, slots=True)
class Header:
    """Where a workload comes from. ``parameters``: JSON values only; with ``name`` and ``seed`` they repeat it."""

    name: str
    seed: int
    parameters: Mapping[str, Any]
    adapters: tuple[Adapter, ...]
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Workload:
    """A header, and ``sessions()``: each call gives the same sessions again, in order of their first arrival.

    Iterating may raise :class:`WorkloadError` where the source is a file.
    """

    header: Header
    sessions: Callable[[], Iterator[Session]]


def prompts(session: Session) -> Iterator[tuple[tuple[Piece, ...], Piece]]:
    """The prompt's pieces and the answer of every turn."""
    context: tuple[Piece, ...] = ()
    for turn in session.turns:
        prompt = context[: turn.keep] + turn.new
        yield prompt, turn.answer
        context = (*prompt, turn.answer)


def common(one: Sequence[Piece], other: Sequence[Piece]) -> int:
    """How many pieces two prompts share from the start."""
    return next(
        (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def tokens(pieces: tuple[Piece, ...]) -> int:
    """Length of a prompt in tokens."""
    return sum(piece.tokens for piece in pieces)


def fault(session: Session, adapters: int) -> str | None:
    """What makes a session unusable, in words, or None. ``adapters``: how many the header lists."""
    if not session.turns:
        return "the session has no turns"
    if session.adapter is not None and not 0 <= session.adapter < adapters:
        return f"adapter {session.adapter} is not among the {adapters} of the header"
    pieces, last = 0, 0.0
    for number, turn in enumerate(session.turns):
        where = f"turn {number}"
        if (turn.at is None) == (turn.think is None):
            return f"{where} must have one of at and think"
        if number == 0 and turn.at is None:
            return "the first turn must have at"
        if not 0 <= turn.keep <= pieces:
            return f"{where} keeps {turn.keep} pieces of a context of {pieces}"
        if turn.keep + len(turn.new) == 0:
            return f"{where} has an empty prompt"
        for piece in (*turn.new, turn.answer):
            if piece.tokens < 1 or not -MAX_ID - 1 <= piece.id <= MAX_ID:
                return f"{where} has a piece with id {piece.id} and {piece.tokens} tokens"
        if turn.think is not None and not 0 <= turn.think < float("inf"):
            return f"{where} thinks for {turn.think} seconds"
        if turn.at is not None:
            if not last <= turn.at < float("inf"):
                return f"{where} arrives at {turn.at} s, after {last} s"
            last = turn.at
        pieces = turn.keep + len(turn.new) + 1
    return None
