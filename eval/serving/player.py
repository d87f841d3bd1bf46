"""The one driver of live servers: sessions of a workload are sent, answers are timed.

A piece of content becomes the same tokens wherever it stands. What the model answered stands in later prompts in the
place of the answer's piece. So the server sees what the simulator counts.

Sessions come in *lanes*; those of one lane follow one another. Two kinds of load:

- Open loop (:func:`play`): each session is a lane, and its turns come at the workload's own times.
- Closed loop (:func:`serve` with ``spread``): the lanes are the sessions that are alive at the same time. Waits are
  shares of the mean gap, that is lanes over rate, so a rate of turns a second follows.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
from tqdm import tqdm

from elora_sglang.eval.support import estimates
from elora_sglang.eval.workloads.model import Piece, Session, Turn, Workload

FIRST_ID = 5  # below are the tokenizer's control tokens
LOOK = 0.25  # seconds between looks at whether the run is over, or its rate another
PATIENCE_S = 600.0  # after which a request is taken for lost

Lanes = Sequence[Sequence[Session]]


@dataclass(frozen=True)
class Answer:
    """One answered request.

    Attributes:
        key: session/turn.
        sent: seconds after the start of the run.
        ttft, tpot: seconds at the client; ``tpot`` is 0 for an answer of one token.
        prompt_tokens, cached_tokens, cached_host: lengths; of the cached ones, those that came from the host.
        output_ids: tokens of the answer.
    """

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


async def send(
    http: aiohttp.ClientSession, url: str, payload: dict[str, Any]
) -> tuple[float, float, dict[str, Any]]:
    """Stream an answer from SGLang's native ``/generate``: seconds to the first and to the last token, the last chunk.

    Raises RuntimeError with the server's message.
    """
    started = time.perf_counter()
    first = last = 0.0
    final: dict[str, Any] = {}
    async with http.post(f"{url}/generate", json=payload | {"stream": True}) as reply:
        if reply.status != 200:
            raise RuntimeError(f"HTTP {reply.status}: {(await reply.text())[:500]}")
        async for line in reply.content:
            if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
                continue
            chunk = json.loads(line[5:])
            if "error" in chunk:
                raise RuntimeError(f"stream error: {chunk['error']}")
            # Counted by tokens, not by text: a token may decode to an empty string.
            if chunk["meta_info"]["completion_tokens"] > 0:
                last = time.perf_counter() - started
                first = first or last
                final = chunk
    return first, last, final


def words(piece: Piece, vocab: int) -> tuple[int, ...]:
    """Token ids of a piece; a shorter piece of the same id is the start of a longer one."""
    rng = random.Random(f"piece/{piece.id}")
    return tuple(rng.randrange(FIRST_ID, vocab) for _ in range(piece.tokens))


@dataclass(frozen=True)
class Step:
    """So many turns a second, measured for so many seconds."""

    rate: float
    seconds: float


@dataclass(frozen=True)
class Served:
    """All answers of one run; when each step's measured time began, and snapshots at its two ends."""

    answers: list[Answer]
    begins: list[float]
    snapshots: list[tuple[Any, Any]]


@dataclass
class _Run:
    """One run of :func:`serve`, in the open loop or, with ``spread``, in the closed one."""

    url: str
    lanes: Lanes
    names: Sequence[str]
    vocab: int
    spread: float | None = None
    rate: float = math.inf
    hints: bool = False
    told: Callable[[], object] = lambda: None
    until_s: float = math.inf

    def __post_init__(self) -> None:
        self.answers: list[Answer] = []
        self.failures: list[str] = []
        self.began = time.perf_counter()
        #: Lanes without an answer; set when there are none; seconds at which that was.
        self.cold, self.warm, self.warm_at = len(self.lanes), asyncio.Event(), math.inf

    def now(self) -> float:
        """Seconds after the start."""
        return time.perf_counter() - self.began

    async def idle(self, seconds: float) -> None:
        """As long, but not beyond the end of the run."""
        wake = self.now() + seconds
        while (left := min(wake, self.until_s) - self.now()) > 0:
            await asyncio.sleep(min(left, LOOK))

    async def wait(self, turn: Turn, first: bool) -> None:
        """Until the turn is due. ``first``: of its lane."""
        wait = turn.think or 0.0 if turn.at is None else turn.at
        if self.spread is None:
            await self.idle(wait if turn.at is None else wait - self.now())
        elif first:
            await self.idle(wait * self.spread)
        else:
            # A share of the mean gap, which is what it is at each moment.
            while wait > 0 and self.now() < self.until_s:
                gap = len(self.lanes) / self.rate
                nap = min(wait * gap, LOOK)
                await asyncio.sleep(nap)
                wait -= nap / gap

    async def go(self) -> None:
        """All lanes at the same time; RuntimeError when a request failed."""
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
            await asyncio.gather(*(self._lane(http, lane) for lane in self.lanes))
        if self.failures:
            raise RuntimeError(f"{len(self.failures)} requests failed, the first: {self.failures[0]}")

    async def _lane(self, http: aiohttp.ClientSession, lane: Sequence[Session]) -> None:
        first = True
        for session in lane:
            context: list[tuple[int, ...]] = []
            for number, turn in enumerate(session.turns):
                await self.wait(turn, first)
                if self.now() >= self.until_s:
                    return
                context = context[: turn.keep] + [words(piece, self.vocab) for piece in turn.new]
                answer = await self._answer(http, session, number, context)
                if answer is None:
                    return
                context.append(answer.output_ids)
                if first:
                    first = False
                    self.cold -= 1
                    if self.cold == 0:
                        self.warm_at = self.now()
                        self.warm.set()

    async def _answer(
        self, http: aiohttp.ClientSession, session: Session, number: int, context: list[tuple[int, ...]]
    ) -> Answer | None:
        """None after a failure, which ends the run: the other lanes finish what they sent."""
        key, ids = f"{session.id}/{number}", [token for piece in context for token in piece]
        tokens = session.turns[number].answer.tokens
        params: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}
        if self.hints:
            last_turn = number + 1 == len(session.turns)
            params["custom_params"] = {"session_id": session.id, "session_end": last_turn}
        payload = {"input_ids": ids, "sampling_params": params}
        if session.adapter is not None:
            payload["lora_path"] = self.names[session.adapter]
        sent = self.now()
        try:
            first, last, final = await send(http, self.url, payload)
            about, output = final["meta_info"], tuple(final["output_ids"])
        except (RuntimeError, aiohttp.ClientError, TimeoutError, KeyError) as error:
            self.failures.append(f"{key}: {type(error).__name__}: {error}")
            self.until_s = 0.0
            self.warm.set()
            return None
        tiers = (about.get("cached_tokens_details") or {}).items()
        host = sum(value for tier, value in tiers if tier != "device" and isinstance(value, int))
        tpot = (last - first) / (len(output) - 1) if len(output) > 1 else 0.0
        cached = int(about.get("cached_tokens", 0))
        self.answers.append(Answer(key, sent, first, tpot, len(ids), cached, host, output))
        self.told()
        return self.answers[-1]


class _Burst(_Run):
    """Nobody thinks, but all wait until every lane has had its first answer."""

    async def wait(self, turn: Turn, first: bool) -> None:
        if not first:
            await self.warm.wait()


async def _steps(run: _Run, steps: Sequence[Step], settle: float, snapshot: Callable[[], Any]) -> Served:
    """Step after step; sets when the run ends."""
    served = Served(run.answers, [], [])
    if run.spread is not None:
        await run.warm.wait()
        await run.idle(run.spread - run.now())
    if steps:
        run.until_s = min(run.until_s, run.now() + sum(settle + step.seconds for step in steps))
    for step in steps:
        run.rate = step.rate
        await run.idle(settle)
        before = await asyncio.to_thread(snapshot)
        served.begins.append(run.now())
        await run.idle(step.seconds)
        served.snapshots.append((before, await asyncio.to_thread(snapshot)))
    return served


def serve(
    url: str,
    lanes: Lanes,
    names: Sequence[str],
    *,
    vocab: int,
    steps: Sequence[Step] = (),
    settle: float = 0.0,
    spread: float | None = None,
    snapshot: Callable[[], Any] = lambda: None,
    sample: Callable[[], Any] | None = None,
    every: float = 5.0,
    bar: str | None = None,
    **options: Any,
) -> Served:
    """Serve the lanes; what was sent is answered.

    Args:
        url: of the server.
        lanes: sessions; adapters by index.
        names: of the adapters on the server, by the same index.
        vocab: token ids below it are used.
        steps: measured one after the other, after one warm-up; the run ends with the last. None: with the last turn.
        settle: seconds before each step that are not measured.
        spread: None for the open loop. Else the closed one: the lanes come in during so many seconds, and the first
            step begins when each of them has had an answer. A slow server is asked less. Needs steps.
        snapshot: called at both ends of each step, in a thread.
        sample: called every ``every`` seconds, in a thread.
        bar: a progress bar is shown under this name.
        options: ``hints``: whether requests carry session hints. ``until_s``: turns that are due later are not sent.

    Raises RuntimeError when a request fails.
    """

    async def all_of_it(shown: tqdm[Any]) -> Served:
        rate = steps[0].rate if steps else math.inf
        run = _Run(url, lanes, names, vocab, spread, rate, told=shown.update, **options)
        work = asyncio.create_task(run.go())
        line = asyncio.create_task(_steps(run, steps, settle, snapshot))
        while not work.done():
            await asyncio.wait({work}, timeout=every)
            if sample is not None and not work.done():
                await asyncio.to_thread(sample)
        await work
        return await line

    turns = sum(len(session.turns) for lane in lanes for session in lane)
    with tqdm(total=turns, unit="turn", desc=bar, leave=False, disable=bar is None) as shown:
        return asyncio.run(all_of_it(shown))


def lanes_of(workload: Workload) -> Lanes:
    """Every session by itself."""
    return [[session] for session in workload.sessions()]


def play(url: str, workload: Workload, names: Sequence[str], *, vocab: int, **options: Any) -> list[Answer]:
    """The turns of the workload at its own times, in the order of their answers; see :func:`serve`."""
    return serve(url, lanes_of(workload), names, vocab=vocab, **options).answers


def burst(
    url: str, lanes: Lanes, names: Sequence[str], *, vocab: int, turns: int
) -> tuple[list[Answer], float]:
    """All lanes send ``turns`` turns each, one right after the other: (their answers, seconds until the last).

    Before, each lane has one answer to a history that no cache knows. Until the *last* answer: a server that serves
    some sessions first, and others never, gains nothing by it.

    Raises RuntimeError when a request fails.
    """

    async def all_of_it() -> _Run:
        run = _Burst(url, [_first_turns(lane, 1 + turns) for lane in lanes], names, vocab)
        await run.go()
        return run

    run = asyncio.run(all_of_it())
    counted = [answer for answer in run.answers if answer.sent >= run.warm_at]
    return counted, max(answer.finished for answer in counted) - run.warm_at


def _first_turns(lane: Sequence[Session], turns: int) -> list[Session]:
    found = []
    for session in lane:
        if turns > 0:
            found.append(replace(session, turns=session.turns[:turns]))
        turns -= len(session.turns)
    return found


def due(workload: Workload) -> dict[str, float]:
    """When each turn is due, by its key: its own time, or that of its session where it follows an answer."""
    return {
        f"{session.id}/{number}": session.start if turn.at is None else turn.at
        for session in workload.sessions()
        for number, turn in enumerate(session.turns)
    }


def summary(answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """TTFT and TPOT in seconds, turns a second, and shares of prompt tokens by where they were found.

    Raises ValueError where there is no answer.
    """
    if not answers:
        raise ValueError("no request was answered after the warm-up: make the run longer")
    ttft = [one.ttft for one in answers]
    prompt = sum(one.prompt_tokens for one in answers)
    host = sum(one.cached_host for one in answers)
    return {
        "requests": len(answers),
        "rate": len(answers) / seconds,
        "ttft_mean": statistics.fmean(ttft),
        **{f"ttft_p{round(100 * share)}": estimates.quantile(ttft, share) for share in (0.5, 0.95, 0.99)},
        "tpot_mean": statistics.fmean([one.tpot for one in answers if len(one.output_ids) > 1] or [0.0]),
        "hit_device": (sum(one.cached_tokens for one in answers) - host) / prompt,
        "hit_host": host / prompt,
    }
