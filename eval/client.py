"""An asynchronous client for SGLang's native ``/generate`` that measures what a user feels."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp


@dataclass(frozen=True)
class Job:
    """One request: prompt token ids, the adapter (``None``: base), how many tokens to generate, and
    ``at``, the second after the start of the run at which it is sent."""

    input_ids: tuple[int, ...]
    lora: str | None
    max_new_tokens: int
    at: float = 0.0
    params: Mapping[str, object] | None = None  # SGLang's custom_params, for session hints


@dataclass(frozen=True)
class Answer:
    """What came back. ``ttft`` and ``tpot`` are seconds at the client; ``tpot`` is 0 for one token."""

    output_ids: tuple[int, ...]
    ttft: float
    tpot: float
    cached_tokens: int
    cached_on: Mapping[str, int] = field(default_factory=dict)  # tokens by tier, where the server tells


async def send(session: aiohttp.ClientSession, url: str, job: Job) -> Answer:
    """Stream one greedy answer. Raises ``RuntimeError`` with the server's message on any error."""
    payload: dict = {
        "input_ids": list(job.input_ids),
        "sampling_params": {
            "temperature": 0.0,
            "max_new_tokens": job.max_new_tokens,
            "ignore_eos": True,
        },
        "stream": True,
    }
    if job.lora is not None:
        payload["lora_path"] = job.lora
    if job.params is not None:
        payload["sampling_params"]["custom_params"] = dict(job.params)
    started = time.perf_counter()
    first = last = 0.0
    final: dict = {}
    async with session.post(f"{url}/generate", json=payload) as reply:
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
                last = time.perf_counter()
                first = first or last
                final = chunk
    ids = tuple(final["output_ids"])
    count = int(final["meta_info"]["completion_tokens"])
    return Answer(
        output_ids=ids,
        ttft=first - started,
        tpot=(last - first) / (count - 1) if count > 1 else 0.0,
        cached_tokens=int(final["meta_info"].get("cached_tokens", 0)),
        cached_on={
            tier: value
            for tier, value in (final["meta_info"].get("cached_tokens_details") or {}).items()
            if isinstance(value, int)
        },
    )


async def run_open_loop(url: str, jobs: Sequence[Job]) -> list[Answer]:
    """Send every job at its own time, whatever the server does meanwhile; answers in job order."""
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        started = time.perf_counter()

        async def one(job: Job) -> Answer:
            await asyncio.sleep(max(0.0, job.at - (time.perf_counter() - started)))
            return await send(session, url, job)

        return list(await asyncio.gather(*(one(job) for job in jobs)))


async def run_closed_loop(url: str, jobs: Sequence[Job], concurrency: int) -> list[Answer]:
    """Keep ``concurrency`` requests in flight until all jobs are answered; answers in job order."""
    gate = asyncio.Semaphore(concurrency)
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:

        async def one(job: Job) -> Answer:
            async with gate:
                return await send(session, url, job)

        return list(await asyncio.gather(*(one(job) for job in jobs)))
