"""Send chat traffic to one server and note what the user feels."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp

from elora_sglang.eval import client
from elora_sglang.eval.serving.chat import Session, Workload, opening

SPREAD = 0.7  # of the warm-up: when the live sessions come in


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
        until: float,
        seed: str,
        vocab: int,
    ) -> None:
        self.url, self.workload, self.names, self.gap, self.spread = url, workload, names, gap, spread
        self.until, self.seed, self.vocab = until, seed, vocab
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

    async def _sleep(self, seconds: float) -> None:
        """As long, but not beyond the end of the run."""
        await asyncio.sleep(max(0.0, min(seconds, self.until - self.now())))

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
                return False
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


async def _watched(run: _Run, sample: Callable[[], Any] | None, every: float) -> list[Any]:
    samples: list[Any] = []
    work = asyncio.create_task(run.go())
    while not work.done():
        await asyncio.wait({work}, timeout=every)
        if sample is not None and not work.done():
            samples.append(await asyncio.to_thread(sample))
    await work
    return samples


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
) -> tuple[list[Record], list[Any]]:
    """Serve ``workload`` for ``warmup + seconds`` at ``rate`` turns a second at most; every answered request.

    The sessions that are alive at the start come in during the first part of the warm-up, with histories that no
    cache knows. A turn comes a think time (mean: live sessions / rate) after the last answer, so a slow server is
    asked less.
    ``sample`` is called every so many seconds in a thread of its own. Raises RuntimeError when a request fails.
    """
    run = _Run(
        url, workload, names, len(workload.lanes) / rate, SPREAD * warmup, warmup + seconds, seed, vocab
    )
    run.hints = hints
    samples = asyncio.run(_watched(run, sample, every))
    if run.failures:
        raise RuntimeError(f"{len(run.failures)} requests failed, the first: {run.failures[0]}")
    return run.records, samples


def as_json(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records as plain types."""
    return [asdict(record) for record in records]
