"""Prompts of a live run, what Transformers answers to them, and how a server's answers are held against that."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from support import live, oracle_client
from support.demo_paths import Demo
from support.dialogs import Prompt, prompts

SEED = 20261123
COUNT = 240
# Slots; the largest adapter alone takes about 1,200, all sixteen 5,500, and a full batch of KV 3,700.
STARVED_POOL = "2560"
FP32 = ("--dtype", "float32", "--max-running-requests", "16")


@dataclass(frozen=True)
class Golden:
    """The prompts of the run and what Transformers answers to each."""

    prompts: list[Prompt]
    answers: list[list[int]]
    smallest_margin: float


def make(demo: Demo, work_dir: Path) -> Golden:
    """Ask the oracle, in a process of its own; minutes on few cores, so once per session (fixture ``golden``)."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo.model / "tokenizer.json"))
    found = prompts(lambda text: tokenizer.encode(text).ids, list(demo.adapters), count=COUNT, seed=SEED)
    print(f"seed {SEED}: {len(found)} prompts, {sum(p.adapter is None for p in found)} for the base model")
    answers = oracle_client.ask(
        demo.model,
        demo.adapters,
        [(p.input_ids, p.adapter, p.max_new_tokens) for p in found],
        work_dir=work_dir,
    )
    return Golden(
        found, [answer.output_ids for answer in answers], min(min(answer.margins) for answer in answers)
    )


def ask_all(server: live.LiveServer, jobs: Sequence[Prompt], *, workers: int = 24) -> list[list[int]]:
    """Send all prompts, many at a time so that batches mix adapters; greedy answers in order."""

    def ask(job: Prompt) -> list[int]:
        reply = server.generate(
            input_ids=job.input_ids, lora_path=job.adapter, max_new_tokens=job.max_new_tokens, timeout=300
        )
        return list(reply["output_ids"])

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(ask, jobs))


def assert_equal(golden: Golden, answers: list[list[int]], order: Sequence[int] | None = None) -> None:
    """Every token of every answer equals the oracle's; says which prompts differ and where."""
    order = range(len(golden.prompts)) if order is None else order
    wrong = [
        (index, golden.prompts[index].adapter, golden.answers[index], answer)
        for index, answer in zip(order, answers, strict=True)
        if answer != golden.answers[index]
    ]
    assert not wrong, f"{len(wrong)} of {len(answers)} answers differ, first: {wrong[0]}"


def elora_state(server: live.LiveServer) -> dict:
    return server.get("/server_info").json()["internal_states"][0]["elora"]


class Aborter:
    """Clients that hang up in the middle of an answer, and requests that are aborted while they wait."""

    def __init__(self, server: live.LiveServer, golden: Golden, seed: int) -> None:
        self._server, self._golden, self._rng = server, golden, random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.aborted = 0

    def __enter__(self) -> Aborter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        with ThreadPoolExecutor(4) as pool:
            while not self._stop.is_set():
                job = self._golden.prompts[self._rng.randrange(len(self._golden.prompts))]
                rid = f"abort-{self.aborted}"
                answer = pool.submit(
                    self._server.generate,
                    input_ids=job.input_ids,
                    lora_path=job.adapter,
                    max_new_tokens=64,
                    rid=rid,
                )
                self._stop.wait(self._rng.uniform(0.0, 0.3))
                self._server.post("/abort_request", {"rid": rid})
                answer.exception(timeout=120)
                self.aborted += 1
