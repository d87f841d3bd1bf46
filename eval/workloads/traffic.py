"""What all generators share: their common parameters, sources of ids, and how a conversation is put together."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

from elora_sglang.eval.workloads.draws import LogNormal, geometric
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

    def poisson(self, rate: float, duration_s: float, *name: object) -> Iterator[float]:
        """Arrivals in seconds, ``rate`` a second on average, before ``duration_s``; ``name``: of the draws."""
        rng, at = self.rng("arrivals", *name), 0.0
        while (at := at + rng.expovariate(rate)) < duration_s:
            yield at


def own_ids() -> Iterator[int]:
    """Ids that nothing else of the workload has."""
    return itertools.count(FIRST_OWN_ID)


@dataclass(frozen=True, kw_only=True)
class Bursty(Traffic):
    """Every adapter is on and off in turn, for times that are exponential with means ``on_s`` and ``off_s`` seconds.

    It starts on with probability on / (on + off). While it is on its arrivals are Poisson, at rate x share / that
    probability, where the share is what :class:`Popularity` gives it at that time. So ``off_s`` = 0 is Poisson, and the
    larger off / on, the harder the bursts. Over a short run the actual rate differs from the rate asked for, the more
    so the more an adapter dominates: it may happen to be off for long.
    """

    on_s: float = 20.0
    off_s: float = 60.0

    def bursts(self, rate: float) -> Iterator[tuple[float, int]]:
        """(seconds, adapter) of arrivals, ``rate`` a second on average. Raises :class:`WorkloadError`."""
        if not (0 < self.on_s < math.inf and 0 <= self.off_s < math.inf):
            raise WorkloadError(
                f"bursts need on above 0 s and off of at least 0 s, got {self.on_s:g} and {self.off_s:g}"
            )
        popularity = self.popularity()
        return heapq.merge(*(self._switched(popularity, adapter, rate) for adapter in range(self.adapters)))

    def _switched(self, popularity: Popularity, adapter: int, rate: float) -> Iterator[tuple[float, int]]:
        """The arrivals of one adapter."""
        duty, drift = self.on_s / (self.on_s + self.off_s), popularity.drift_s or math.inf
        rng = random.Random(f"bursts/{self.seed}/{adapter}")

        def stay() -> float:
            return rng.expovariate(1 / (self.on_s if on else self.off_s)) if self.off_s else math.inf

        on = rng.random() < duty
        switch = stay()
        time, epoch = 0.0, 0
        intensity = rate / duty * popularity.share(adapter, epoch)
        due = rng.expovariate(1.0)  # of the integral of the intensity, until the next arrival
        while time < self.duration_s:
            end = min(switch, (epoch + 1) * drift, self.duration_s)
            if on and due < intensity * (end - time):
                time += due / intensity
                due = rng.expovariate(1.0)
                yield time, adapter
                continue
            due -= intensity * (end - time) if on else 0.0
            time = end
            if time >= (epoch + 1) * drift:
                epoch += 1
                intensity = rate / duty * popularity.share(adapter, epoch)
            if time >= switch:
                on = not on
                switch = time + stay()


@dataclass(frozen=True, kw_only=True)
class Conversations(Traffic):
    """Sessions of several turns with think times. Lengths in tokens, times in seconds; means are those of one turn.

    A conversation ends early before its context, the answer included, would exceed ``context_tokens``.
    """

    turns: float
    prompt_tokens: float
    prompt_sigma: float
    prompt_most: int
    answer_tokens: float
    answer_sigma: float
    answer_most: int
    think_s: float
    think_sigma: float
    think_most: float
    context_tokens: int = 8192  # Llama-3-8B's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns < 1:
            raise WorkloadError(f"turns must be at least 1, got {self.turns:g}")
        self._draws()
        self.opening(0)
        self.begins()

    def _draws(self) -> tuple[LogNormal, LogNormal, LogNormal]:
        """Prompts, answers, think times."""
        return (
            LogNormal(self.prompt_tokens, self.prompt_sigma, self.prompt_most),
            LogNormal(self.answer_tokens, self.answer_sigma, self.answer_most),
            LogNormal(self.think_s, self.think_sigma, self.think_most),
        )

    @abstractmethod
    def begins(self) -> Iterator[tuple[float, int]]:
        """(seconds, adapter) of every session."""

    @abstractmethod
    def opening(self, adapter: int) -> tuple[Piece, ...]:
        """What all sessions of an adapter begin with."""

    def sessions(self) -> Iterator[Session]:
        """See :class:`Traffic`."""
        draws, ids = self._draws(), itertools.count(FIRST_OWN_ID)
        openings = [self.opening(adapter) for adapter in range(self.adapters)]
        for number, (at, adapter) in enumerate(self.begins()):
            rng = self.rng(number)
            turns = self._turns(rng, ids, draws, openings[adapter], round(at, 6))
            yield Session(str(number), adapter, tuple(turns))

    def _turns(
        self,
        rng: random.Random,
        ids: Iterator[int],
        draws: Sequence[LogNormal],
        opening: tuple[Piece, ...],
        at: float,
    ) -> Iterator[Turn]:
        prompts, answers, thinks = draws
        length, pieces = sum(piece.tokens for piece in opening), 0
        for turn in range(geometric(rng, self.turns)):
            prompt, answer = prompts.tokens(rng), answers.tokens(rng)
            think = round(thinks.draw(rng), 6)
            length += prompt + answer
            if turn and length > self.context_tokens:
                return
            new = (*(() if turn else opening), Piece(next(ids), prompt))
            when = (think, None) if turn else (None, at)
            yield Turn(pieces, new, Piece(next(ids), answer), *when)
            pieces += len(new) + 1
