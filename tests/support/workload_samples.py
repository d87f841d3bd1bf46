"""Random workloads for tests, and the token-by-token meaning of pieces."""

from __future__ import annotations

import random
from collections.abc import Iterable

from elora_sglang.eval.workloads.model import Piece, Session, Turn

Token = tuple[int, int]


def spelled(pieces: Iterable[Piece]) -> list[Token]:
    """One value per token: the piece's id and the place in the piece."""
    return [(piece.id, place) for piece in pieces for place in range(piece.tokens)]


def prompt(rng: random.Random, pieces: int, longest: int, ids: int) -> tuple[Piece, ...]:
    """Pieces with few different ids, so that prompts collide in every way."""
    return tuple(Piece(rng.randrange(ids), rng.randint(1, longest)) for _ in range(rng.randint(1, pieces)))


def session(rng: random.Random, name: str, at: float, *, ids: int = 5, longest: int = 9) -> Session:
    """A session of up to 5 turns that keep any part of their context; answers are new content."""
    turns: list[Turn] = []
    context = 0
    for number in range(rng.randint(1, 5)):
        new = prompt(rng, 3, longest, ids)
        keep = rng.randint(0, context)
        answer = Piece(rng.randrange(1 << 40, 1 << 41), rng.randint(1, longest))
        closed = number > 0 and rng.random() < 0.5
        at += rng.random()
        when = (round(rng.random(), 3), None) if closed else (None, round(at, 3))
        turns.append(Turn(keep, new, answer, *when))
        context = keep + len(new) + 1
    return Session(name, rng.choice([None, 0, 1]), tuple(turns))


def sessions(rng: random.Random, count: int, **shape: int) -> list[Session]:
    """Sessions in order of their first arrival."""
    starts = sorted(rng.random() * count for _ in range(count))
    made = [session(rng, f"s{number}", at, **shape) for number, at in enumerate(starts)]
    return sorted(made, key=lambda one: one.start)
