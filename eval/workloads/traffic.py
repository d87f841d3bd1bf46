"""What all generators share: their common parameters, sources of ids, and how a conversation is put together."""

from __future__ import annotations

import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import ClassVar

from elora_sglang.eval.workloads.draws import LogNormal
from elora_sglang.eval.workloads.model import Header, Piece, Session, Turn, Workload, WorkloadError
from elora_sglang.eval.workloads.popularity import Popularity, lora_adapters

# Ids below are for what all sessions of an adapter share: the adapter's index; from here on they are used once.
FIRST_OWN_ID = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Traffic(ABC):
    """Parameters of every generator; a subclass adds its own. All of them have defaults and go into the header.

    ``rate``: turns a second offered on average, that is: all turns of the sessions that begin within ``duration_s``
    seconds, divided by it. With think times the last turns come later. ``adapters``, ``skew``, ``drift_s``,
    ``redraw``: see :mod:`.popularity`. ``ranks``: see :func:`.popularity.lora_adapters`.

    The session with a given number has turns of the same lengths whatever the rate, the duration and the skew are.

    Raises :class:`WorkloadError` on parameters that make no sense.
    """

    NAME: ClassVar[str]
    ABOUT: ClassVar[str]

    rate: float = 4.0  # an assumption: what one GPU with an 8B model can be asked for
    duration_s: float = 1800.0  # an assumption: with 4 a second, above 5,000 requests
    adapters: int = 100  # the largest number in the paper's main results: 20, 50, 100
    skew: float = 0.9  # issue: Zipf, 0 to 1.2
    drift_s: float = 600.0  # an assumption
    redraw: float = 0.1  # an assumption
    ranks: str = "32,64"  # the paper's
    seed: int = 0

    def __post_init__(self) -> None:
        self._positive("rate", "duration_s")
        if self.adapters >= FIRST_OWN_ID:
            raise WorkloadError(f"at most {FIRST_OWN_ID - 1} adapters, got {self.adapters}")
        self.popularity()

    def _positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise WorkloadError(f"{name} must be above 0, got {value}")

    def popularity(self) -> Popularity:
        """Who gets which adapter, as the parameters say."""
        return Popularity(
            self.adapters, skew=self.skew, drift_s=self.drift_s, redraw=self.redraw, seed=self.seed
        )

    @abstractmethod
    def sessions(self) -> Iterator[Session]:
        """The sessions in order of their first arrival, generated as they are asked for."""

    def workload(self) -> Workload:
        """The workload with its header."""
        parameters = asdict(self)
        seed = parameters.pop("seed")
        adapters = lora_adapters(self.adapters, self.ranks, self.seed)
        return Workload(Header(self.NAME, seed, parameters, adapters), self.sessions)

    def rng(self, *name: object) -> random.Random:
        """A source of draws for one purpose."""
        return random.Random("/".join(map(str, (self.NAME, self.seed, *name))))


def own_ids() -> Iterator[int]:
    """Ids that nothing else of the workload has."""
    return itertools.count(FIRST_OWN_ID)


@dataclass(frozen=True)
class Talk:
    """How the turns of a conversation are drawn.

    ``think`` in seconds, the other lengths in tokens. A conversation ends early before its context, the answer
    included, would exceed ``context_tokens``.
    """

    prompt: LogNormal
    answer: LogNormal
    think: LogNormal
    context_tokens: int

    def session(
        self,
        rng: random.Random,
        ids: Iterator[int],
        *,
        number: int,
        adapter: int,
        at: float,
        opening: tuple[Piece, ...],
        turns: int,
    ) -> Session:
        """A session with up to ``turns`` turns, at least one; its first prompt begins with ``opening``.

        ``rng`` and ``ids`` move on.
        """
        made: list[Turn] = []
        length, pieces = sum(piece.tokens for piece in opening), 0
        for turn in range(turns):
            prompt, answer = self.prompt.tokens(rng), self.answer.tokens(rng)
            think = round(self.think.draw(rng), 6)
            length += prompt + answer
            if made and length > self.context_tokens:
                break
            new = (*(() if made else opening), Piece(next(ids), prompt))
            when = (None, round(at, 6)) if turn == 0 else (think, None)
            made.append(Turn(pieces, new, Piece(next(ids), answer), *when))
            pieces += len(new) + 1
        return Session(str(number), adapter, tuple(made))
