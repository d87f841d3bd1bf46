"""Send chat traffic to one server and note what the user feels."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import aiohttp

from elora_sglang.eval import client
from elora_sglang.eval.serving.chat import Session, Workload, opening

LOOK = 0.25  # seconds between looks at whether the run is over, or its rate another


@dataclass(frozen=True)
class Step:
    """So many turns a second at most, measured for so many seconds."""

    rate: float
    seconds: float


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


def host_tokens(answer: client.Answer) -> int:
    """Tokens of the prompt that came from the host."""
    return sum(value for tier, value in answer.cached_on.items() if tier != "device")


@dataclass(frozen=True)
class Served:
    """All answered requests of one run; when each step's measured time began, and snapshots at its two ends."""

    records: list[Record]
    begins: list[float]
    snapshots: list[tuple[Any, Any]]


class _Run:
    def __init__(
        self,
        url: str,
        workload: Workload,
        names: Sequence[str],
        steps: Sequence[Step],
        spread: float,
        settle: float,
        seed: str,
        vocab: int,
        hints: bool,
    ) -> None:
        self.url, self.workload, self.names, self.steps = url, workload, names, steps
        self.spread, self.settle, self.seed, self.vocab, self.hints = spread, settle, seed, vocab, hints
        self.rate = steps[0].rate
        self.until = math.inf
        self.cold = len(workload.lanes)
        self.warm = asyncio.Event()
        self.warm_at = math.inf
        self.records: list[Record] = []
        self.begins: list[float] = []
        self.snapshots: list[tuple[Any, Any]] = []
        self.failures: list[str] = []
        self.started = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.started

    async def go(self) -> None:
        timeout = aiohttp.ClientTimeout(total=600)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
            await asyncio.gather(*(self._lane(http, number) for number in range(len(self.workload.lanes))))

    async def timeline(self, snapshot: Callable[[], Any]) -> None:
        """Step after step, from the last lane's first answer on; sets when the run ends."""
        await self.warm.wait()
        await self._idle(self.spread - self.now())
        self.until = self.now() + sum(self.settle + step.seconds for step in self.steps)
        for step in self.steps:
            self.rate = step.rate
            await self._idle(self.settle)
            before = await asyncio.to_thread(snapshot)
            self.begins.append(self.now())
            await self._idle(step.seconds)
            self.snapshots.append((before, await asyncio.to_thread(snapshot)))

    async def _idle(self, seconds: float) -> None:
        """As long, but not beyond the end of the run."""
        wake = self.now() + seconds
        while (left := min(wake, self.until) - self.now()) > 0:
            await asyncio.sleep(min(left, LOOK))

    async def _think(self, share: float) -> None:
        """``share`` of the mean think time, which is what it is at each moment; not beyond the end of the run."""
        while share > 0 and self.now() < self.until:
            gap = len(self.workload.lanes) / self.rate
            nap = min(share * gap, LOOK)
            await asyncio.sleep(nap)
            share -= nap / gap

    async def _lane(self, http: aiohttp.ClientSession, lane: int) -> None:
        rng = random.Random(f"start/{self.seed}/{lane}")
        await self._idle(rng.random() * self.spread)
        for number, session in enumerate(self.workload.lanes[lane]):
            if not await self._session(http, f"{lane}/{number}", session):
                return

    async def _session(self, http: aiohttp.ClientSession, key: str, session: Session) -> bool:
        """Whether the run goes on."""
        tokens = opening(session, f"{self.seed}/{key}", self.vocab)
        for at in range(session.skip, len(session.turns)):
            turn = session.turns[at]
            if at > session.skip:
                await self._think(turn.think)
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
                self.warm.set()
                return False
            if at == session.skip and key.endswith("/0"):
                self.cold -= 1
                if self.cold == 0:
                    self.warm_at = self.now()
                    self.warm.set()
            self.records.append(
                Record(
                    f"{key}/{at}",
                    sent,
                    answer.ttft,
                    answer.tpot,
                    len(tokens),
                    answer.cached_tokens,
                    host_tokens(answer),
                    answer.output_ids,
                )
            )
            tokens += answer.output_ids
        # The next user comes up to a mean gap after this one left.
        await self._think(random.Random(f"next/{self.seed}/{key}").random())
        return self.now() < self.until


class _Burst(_Run):
    async def _think(self, share: float) -> None:
        """Nobody thinks, but all wait for the last first answer."""
        await self.warm.wait()


def burst(
    url: str, workload: Workload, names: Sequence[str], *, turns: int, seed: str, vocab: int
) -> tuple[int, float]:
    """All lanes send ``turns`` turns each, one right after the other: (turns answered, seconds until the last).

    Before, each lane has one answer to a history that no cache knows. Until the *last* answer: a server that serves
    some sessions first, and others never, gains nothing by it.

    Raises RuntimeError when a request fails.
    """

    async def serve() -> _Run:
        steps = [Step(math.inf, math.inf)]
        run = _Burst(url, _cut(workload, 1 + turns), names, steps, 0.0, 0.0, seed, vocab, hints=False)
        await run.go()
        return run

    run = asyncio.run(serve())
    if run.failures:
        raise RuntimeError(f"{len(run.failures)} requests failed, the first: {run.failures[0]}")
    counted = [record for record in run.records if record.sent >= run.warm_at]
    return len(counted), max(record.finished for record in counted) - run.warm_at


def _cut(workload: Workload, turns: int) -> Workload:
    """The first ``turns`` turns of each lane."""
    lanes = []
    for lane in workload.lanes:
        left, sessions = turns, []
        for session in lane:
            kept = session.turns[: session.skip + left]
            if left > 0:
                sessions.append(replace(session, turns=kept))
            left -= len(kept) - session.skip
        lanes.append(tuple(sessions))
    return replace(workload, lanes=tuple(lanes))


async def _watched(
    run: _Run, snapshot: Callable[[], Any], sample: Callable[[], Any] | None, every: float
) -> None:
    work, line = asyncio.create_task(run.go()), asyncio.create_task(run.timeline(snapshot))
    while not work.done():
        await asyncio.wait({work}, timeout=every)
        if sample is not None and not work.done():
            await asyncio.to_thread(sample)
    await work
    await line


def chat(
    url: str,
    workload: Workload,
    names: Sequence[str],
    *,
    steps: Sequence[Step],
    spread: float,
    settle: float,
    seed: str,
    vocab: int,
    hints: bool = False,
    snapshot: Callable[[], Any] = lambda: None,
    sample: Callable[[], Any] | None = None,
    every: float = 5.0,
) -> Served:
    """Serve ``workload`` at the rate of each of ``steps`` in turn, one warm-up for all of them.

    The sessions that are alive at the start come in during the first ``spread`` seconds, with histories that no
    cache knows. The first step begins when each of them has had its first answer; ``settle`` seconds after a change of
    the rate are not measured. A turn comes a think time (mean: live sessions / rate) after the last answer, so a slow
    server is asked less. ``snapshot`` is called at both ends of each measured time, ``sample`` every so many seconds,
    both in a thread.

    Raises RuntimeError when a request fails.
    """

    async def serve() -> Served:
        run = _Run(url, workload, names, steps, spread, settle, seed, vocab, hints)
        await _watched(run, snapshot, sample, every)
        if run.failures:
            raise RuntimeError(f"{len(run.failures)} requests failed, the first: {run.failures[0]}")
        return Served(run.records, run.begins, run.snapshots)

    return asyncio.run(serve())


def as_json(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Records as plain types."""
    return [asdict(record) for record in records]
