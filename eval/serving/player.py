"""Play a workload's sessions against a live server: prompts in tokens, real answers, arrivals and think times kept.

A piece of content becomes the same tokens wherever it stands; what the model answered stands in later prompts in the
place of the answer's piece. So the server sees what the simulator counts.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp

from elora_sglang.eval import client
from elora_sglang.eval.serving.chat import FIRST_ID
from elora_sglang.eval.serving.drive import Record, host_tokens
from elora_sglang.eval.workloads.model import Piece, Session, Workload

#: Seconds after which a request is taken for lost.
PATIENCE_S = 600.0


def words(piece: Piece, vocab: int) -> tuple[int, ...]:
    """Token ids of a piece; a shorter piece of the same id is the start of a longer one."""
    rng = random.Random(f"piece/{piece.id}")
    return tuple(rng.randrange(FIRST_ID, vocab) for _ in range(piece.tokens))


class _Play:
    def __init__(
        self,
        url: str,
        workload: Workload,
        names: Sequence[str],
        vocab: int,
        told: Callable[[int], None],
        until_s: float,
    ) -> None:
        self.url, self.workload, self.names, self.vocab = url, workload, names, vocab
        self.until_s = until_s
        self.records: list[Record] = []
        self.failures: list[str] = []
        self._told = told
        self._started = time.perf_counter()

    def _now(self) -> float:
        return time.perf_counter() - self._started

    async def go(self) -> None:
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
            sessions = list(self.workload.sessions())
            await asyncio.gather(*(self._session(http, session) for session in sessions))

    async def _session(self, http: aiohttp.ClientSession, session: Session) -> None:
        context: list[tuple[int, ...]] = []
        name = None if session.adapter is None else self.names[session.adapter]
        due = 0.0
        for number, turn in enumerate(session.turns):
            due = turn.at if turn.at is not None else self._now() + (turn.think or 0.0)
            if due >= self.until_s:
                return
            await asyncio.sleep(max(0.0, due - self._now()))
            if self.failures:
                return
            context = context[: turn.keep] + [words(piece, self.vocab) for piece in turn.new]
            prompt = tuple(token for piece in context for token in piece)
            sent = self._now()
            try:
                answer = await client.send(http, self.url, client.Job(prompt, name, turn.answer.tokens))
            except (RuntimeError, aiohttp.ClientError, TimeoutError, KeyError) as error:
                self.failures.append(f"{session.id}/{number}: {type(error).__name__}: {error}")
                return
            context.append(answer.output_ids)
            self.records.append(
                Record(
                    f"{session.id}/{number}",
                    sent,
                    answer.ttft,
                    answer.tpot,
                    len(prompt),
                    answer.cached_tokens,
                    host_tokens(answer),
                    answer.output_ids,
                )
            )
            self._told(len(self.records))


def play(
    url: str,
    workload: Workload,
    names: Sequence[str],
    *,
    vocab: int,
    told: Callable[[int], None] = lambda answered: None,
    until_s: float = math.inf,
) -> list[Record]:
    """The turns of the workload, in the order of their answers; ``sent`` in seconds after the start.

    Args:
        url: of the server.
        workload: adapters by index.
        names: of the adapters on the server, by the same index.
        vocab: token ids below it are used.
        told: called after each answer with how many there are.
        until_s: turns that are due later are not sent; what was sent is answered.

    Raises RuntimeError when a request fails.
    """

    async def serve() -> list[Record]:
        run = _Play(url, workload, names, vocab, told, until_s)
        await run.go()
        if run.failures:
            raise RuntimeError(f"{len(run.failures)} requests failed, the first: {run.failures[0]}")
        return run.records

    return asyncio.run(serve())


def due(workload: Workload) -> dict[str, float]:
    """When each turn is due, by its key: its own time, or that of its session where it follows an answer."""
    return {
        f"{session.id}/{number}": session.start if turn.at is None else turn.at
        for session in workload.sessions()
        for number, turn in enumerate(session.turns)
    }


def sent(records: Sequence[Record]) -> dict[str, float]:
    """When each turn was sent, by its key."""
    return {record.key: record.sent for record in records}


def summary(records: Sequence[Record], times: Mapping[str, float], warmup_s: float) -> dict[str, Any]:
    """Mean and percentiles of TTFT and TPOT (s), and shares of prompt tokens by tier.

    Counted is what ``times`` (:func:`due`, as the simulator counts, or :func:`sent`) puts at ``warmup_s`` or later.
    Raises ValueError where nothing is left.
    """
    kept = [record for record in records if times[record.key] >= warmup_s]
    if not kept:
        raise ValueError(f"nothing was due after the warm-up of {warmup_s:g} s")
    ttft = sorted(record.ttft for record in kept)
    prompt = sum(record.prompt_tokens for record in kept)
    cached = sum(record.cached_tokens for record in kept)
    host = sum(record.cached_host for record in kept)
    tpot = [record.tpot for record in kept if len(record.output_ids) > 1]
    return {
        "requests": len(kept),
        "ttft": {
            "mean": sum(ttft) / len(ttft),
            **{f"p{round(100 * q)}": ttft[min(int(q * len(ttft)), len(ttft) - 1)] for q in (0.5, 0.95, 0.99)},
        },
        "tpot": {"mean": sum(tpot) / len(tpot) if tpot else 0.0},
        "kv_hits": {"device": (cached - host) / prompt, "host": host / prompt},
    }
