"""Shares and speeds of workloads. A session is taken or left as a whole, by a hash of its id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from elora_sglang.eval.workloads.draws import uniform
from elora_sglang.eval.workloads.model import Session, Workload, WorkloadError


def filtered(workload: Workload, keep: Callable[[Session], bool], **parameters: Any) -> Workload:
    """The sessions that ``keep`` takes; ``parameters`` go into the header."""
    header = replace(workload.header, parameters={**workload.header.parameters, **parameters})
    return Workload(header, lambda: (session for session in workload.sessions() if keep(session)))


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
    header = replace(workload.header, parameters={**workload.header.parameters, "speed": speed})
    return Workload(header, lambda: (sped(session, speed) for session in workload.sessions()))


def check_speed(speed: float) -> None:
    """Raises :class:`WorkloadError` unless arrival times can be divided by it."""
    if not 0 < speed < float("inf"):
        raise WorkloadError(f"speed must be above 0, got {speed:g}")
