"""Shares and speeds of workloads. A session is taken or left as a whole, by a hash of its id."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from elora_sglang.eval.workloads.draws import uniform
from elora_sglang.eval.workloads.model import Session, Turn, Workload, WorkloadError, prompts


def filtered(workload: Workload, keep: Callable[[Session], bool], **parameters: Any) -> Workload:
    """The sessions that ``keep`` takes; ``parameters`` go into the header."""
    return _with(workload, lambda: filter(keep, workload.sessions()), **parameters)


def _with(workload: Workload, sessions: Callable[[], Iterator[Session]], **parameters: Any) -> Workload:
    """Other ``sessions`` under the same header; ``parameters`` go into it."""
    header = replace(workload.header, parameters={**workload.header.parameters, **parameters})
    return Workload(header, sessions)


def _share(share: float) -> None:
    if not 0 <= share <= 1:
        raise WorkloadError(f"a share of sessions lies between 0 and 1, got {share:g}")


def sample(workload: Workload, share: float, seed: int = 0) -> Workload:
    """A seeded share of the sessions, with their adapters and times as they were."""
    _share(share)
    return filtered(workload, lambda s: uniform("sample", seed, s.id) < share, sample=share, sample_seed=seed)


def split(workload: Workload, share: float, seed: int = 0) -> tuple[Workload, Workload]:
    """(tuning, held out): every session is in one of them, about ``share`` of them in the first.

    Content that sessions of both share, a system prompt for one, is in both.
    """
    _share(share)
    about = {"part_share": share, "part_seed": seed}
    return (
        filtered(workload, lambda s: uniform("split", seed, s.id) < share, part="tuning", **about),
        filtered(workload, lambda s: uniform("split", seed, s.id) >= share, part="held-out", **about),
    )


def sped(session: Session, speed: float) -> Session:
    """The session with its arrival times divided by ``speed``; think times, which are people's, stay."""
    if speed == 1:
        return session
    turns = tuple(t if t.at is None else replace(t, at=round(t.at / speed, 6)) for t in session.turns)
    return replace(session, turns=turns)


def faster(workload: Workload, speed: float) -> Workload:
    """The workload with its arrival times divided by ``speed``; think times stay."""
    check_speed(speed)
    return _with(workload, lambda: (sped(session, speed) for session in workload.sessions()), speed=speed)


def since(workload: Workload, seconds: float, *, token_s: float = 0.01) -> Workload:
    """The workload from ``seconds`` on, as if it had gone on for so long before: times count from there.

    Turns before that are over, and what was said in them stands in the first prompt that is left. So a run begins
    with as many sessions under way as there are later on, though with empty caches. When a turn that follows an
    answer would have come is taken from its think time and ``token_s`` seconds for each token of the answer.
    """
    if not 0 <= seconds < float("inf"):
        raise WorkloadError(f"a workload is cut at 0 seconds or later, got {seconds:g}")

    def sessions() -> Iterator[Session]:
        stream, early = iter(workload.sessions()), []
        following = next(stream, None)
        while following is not None and following.start < seconds:
            left = _since(following, seconds, token_s)
            if left is not None:
                early.append(left)
            following = next(stream, None)
        later = () if following is None else itertools.chain((following,), stream)
        moved = (replace(s, turns=tuple(_earlier(t, seconds) for t in s.turns)) for s in later)
        yield from heapq.merge(sorted(early, key=_start), moved, key=_start)

    return _with(workload, sessions, since=seconds)


def _start(session: Session) -> float:
    return session.start


def _earlier(turn: Turn, seconds: float) -> Turn:
    return turn if turn.at is None else replace(turn, at=round(turn.at - seconds, 6))


def _since(session: Session, seconds: float, token_s: float) -> Session | None:
    """What is left of a session that began earlier; None if it was over."""
    now, said = 0.0, list(prompts(session))
    for number, turn in enumerate(session.turns):
        now = turn.at if turn.at is not None else now + (turn.think or 0.0)
        if now >= seconds:
            first = Turn(0, said[number][0], turn.answer, at=round(now - seconds, 6))
            # Pieces keep their places, so what later turns keep of the context is the same.
            rest = (_earlier(later, seconds) for later in session.turns[number + 1 :])
            return replace(session, turns=(first, *rest))
        now += turn.answer.tokens * token_s
    return None


def check_speed(speed: float) -> None:
    """Raises :class:`WorkloadError` unless arrival times can be divided by it."""
    if not 0 < speed < float("inf"):
        raise WorkloadError(f"speed must be above 0, got {speed:g}")
