"""Send chat traffic to one server and note what the user feels."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

from elora_sglang.eval import client
from elora_sglang.eval.serving.chat import Session, Workload, opening

SPREAD = 0.7  # of the warm-up: when the live sessions come in
LOOK = 0.25  # seconds between looks at whether the run is over


@dataclass(frozen=True)
class Record:
    """One answered request. ``key``: lane/session/turn; times in seconds, ``sent`` after the start of the run."""

    key: str
    sent: float
    ttft: float
    tpot: float
    prompt_tokens: int
    cached_tokens: int
    cached_host: int
    output_ids: tuple[int, ...]

    @property
    def finished(self) -> float:
        """Second at which the last token came."""
        return self.sent + self.ttft + self.tpot * max(0, len(self.output_ids) - 1)


def _host_tokens(answer: client.Answer) -> int:
    return sum(value for tier, value in answer.cached_on.items() if tier != "device")


class _Run:
    def __init__(
        self,
        url: str,
        workload: Workload,
        names: Sequence[str],
        gap: float,
        spread: float,
        warmup: float,
        seconds: float,
        seed: str,
        vocab: int,
    ) -> None:
        self.url, self.workload, self.names, self.gap, self.spread = url, workload, names, gap, spread
        self.seconds, self.warmup, self.seed, self.vocab = seconds, warmup, seed, vocab
        self.begin = self.until = math.inf
        self.cold = len(workload.lanes)
        self.records: list[Record] = []
        self.failures: list[str] = []
        self.hints = False

    def now(self) -> float:
        return time.perf_counter() - self.started

    async def go(self) -> None:
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
            self.started = time.perf_counter()
            await asyncio.gather(*(self._lane(http, number) for number in range(len(self.workload.lanes))))

    def _warm(self) -> None:
        """A lane has had its first answer; the measured time begins after the last lane's."""
        self.cold -= 1
        if self.cold == 0:
            self.begin = max(self.now(), self.warmup)
            self.until = self.begin + self.seconds

    async def _sleep(self, seconds: float) -> None:
        """As long, but not beyond the end of the run."""
        wake = self.now() + seconds
        while (left := min(wake, self.until) - self.now()) > 0:
            await asyncio.sleep(min(left, LOOK))

    async def _lane(self, http: aiohttp.ClientSession, lane: int) -> None:
        rng = random.Random(f"start/{self.seed}/{lane}")
        await self._sleep(rng.random() * self.spread)
        for number, session in enumerate(self.workload.lanes[lane]):
            if not await self._session(http, f"{lane}/{number}", session):
                return

    async def _session(self, http: aiohttp.ClientSession, key: str, session: Session) -> bool:
        """Whether the run goes on."""
        tokens = opening(session, f"{self.seed}/{key}", self.vocab)
        for at in range(session.skip, len(session.turns)):
            turn = session.turns[at]
            if at > session.skip:
                await self._sleep(turn.think * self.gap)
            if self.now() >= self.until:
                return False
            tokens += turn.user
            hints = None
            if self.hints:
                hints = {"session_id": key, "session_end": at + 1 == len(session.turns)}
            job = client.Job(tuple(tokens), self.names[session.adapter], turn.answer_tokens, params=hints)
            sent = self.now()
            try:
                answer = await client.send(http, self.url, job)
            except (RuntimeError, aiohttp.ClientError, TimeoutError, KeyError) as error:
                self.failures.append(f"{key}/{at}: {type(error).__name__}: {error}")
                self.until = 0.0  # the others finish what they sent
                return False
            if at == session.skip and key.endswith("/0"):
                self._warm()
            self.records.append(
                Record(
                    f"{key}/{at}",
                    sent,
                    answer.ttft,
                    answer.tpot,
                    len(tokens),
                    answer.cached_tokens,
                    _host_tokens(answer),
                    answer.output_ids,
                )
            )
            tokens += answer.output_ids
        # The next user comes a mean gap after this one left.
        await self._sleep(self.gap * random.Random(f"next/{self.seed}/{key}").random())
        return self.now() < self.until


async def _watched(run: _Run, sample: Callable[[], Any] | None, every: float) -> None:
    work = asyncio.create_task(run.go())
    while not work.done():
        await asyncio.wait({work}, timeout=every)
        if sample is not None and not work.done():
            await asyncio.to_thread(sample)
    await work


def chat(
    url: str,
    workload: Workload,
    names: Sequence[str],
    *,
    rate: float,
    warmup: float,
    seconds: float,
    seed: str,
    vocab: int,
    hints: bool = False,
    sample: Callable[[], Any] | None = None,
    every: float = 5.0,
) -> tuple[list[Record], float]:
    """Serve ``workload`` at ``rate`` turns a second at most; every answered request, and when the counted time began.

    It begins after ``warmup`` and not before every session alive at the start had its first answer, and lasts
    ``seconds``.
    The sessions that are alive at the start come in during the first part of the warm-up, with histories that no
    cache knows. A turn comes a think time (mean: live sessions / rate) after the last answer, so a slow server is
    asked less. ``sample`` is called every so many seconds in a thread of its own.

    Raises RuntimeError when a request fails.
    """
    run = _Run(
        url, workload, names, len(workload.lanes) / rate, SPREAD * warmup, warmup, seconds, seed, vocab
    )
    run.hints = hints
    asyncio.run(_watched(run, sample, every))
    if run.failures:
        raise RuntimeError(f"{len(run.failures)} requests failed, the first: {run.failures[0]}")
    return run.records, run.begin


def as_json(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records as plain types."""
    return [asdict(record) for record in records]
