"""Every token of ``--elora`` equals Transformers with merged weights and stock SGLang LoRA.

fp32 and greedy. The golden answers come from a process that never imports SGLang. Small pools make
adapters and KV leave all the time; a run goes on until it has seen enough evictions of each kind, with
the auditor looking on and SGLang's own strict leak check at its default.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import live, oracle_client
from support.demo_paths import Demo
from support.dialogs import Prompt, prompts

from elora_sglang.eval.serving.launch import adapters_for_stock

SEED = 20261123
COUNT = 240
EVICTIONS = 500
# Slots; the largest adapter alone takes about 1,200, all sixteen 5,500, and a full batch of KV 3,700.
STARVED_POOL = "2560"
FP32 = ("--dtype", "float32", "--max-running-requests", "16")


@dataclass(frozen=True)
class Golden:
    """The prompts of the run and what Transformers answers to each."""

    prompts: list[Prompt]
    answers: list[list[int]]
    smallest_margin: float


@pytest.fixture(scope="session")
def golden(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo.model / "tokenizer.json"))
    found = prompts(lambda text: tokenizer.encode(text).ids, list(demo.adapters), count=COUNT, seed=SEED)
    print(f"seed {SEED}: {len(found)} prompts, {sum(p.adapter is None for p in found)} for the base model")
    answers = oracle_client.ask(
        demo.model,
        demo.adapters,
        [(p.input_ids, p.adapter, p.max_new_tokens) for p in found],
        work_dir=tmp_path_factory.mktemp("oracle"),
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


def test_margins_are_not_ties(golden: Golden) -> None:
    """A token that wins by rounding noise would make equality a matter of luck."""
    print(f"smallest top-2 margin: {golden.smallest_margin:.2e}")
    assert golden.smallest_margin > 1e-4


def test_stock_equals_transformers(golden: Golden, demo: Demo, tmp_path: Path) -> None:
    """Stock's slot buffers on the same platform plugin give the same tokens."""
    stock = adapters_for_stock(demo.adapters, tmp_path)
    assert stock != demo.adapters, "the demo has an rsLoRA adapter"
    paths = [f"{name}={path}" for name, path in stock.items()]
    flags = ("--enable-lora", "--lora-backend", "torch_native", "--max-loras-per-batch", "17")
    with live.server(
        demo.model, *FP32, *flags, "--lora-paths", *paths, "--max-total-tokens", "60000", log_dir=tmp_path
    ) as server:
        assert_equal(golden, ask_all(server, golden.prompts))


@dataclass(frozen=True)
class Cell:
    """One configuration of the matrix."""

    name: str
    flags: tuple[str, ...]
    starved: bool = True
    full: bool = False
    retract: bool = False


CELLS = [
    Cell("roomy", (), starved=False),
    Cell("starved", ("--chunked-prefill-size", "64")),
    Cell(
        "starved-page16-no-overlap",
        ("--page-size", "16", "--disable-overlap-schedule"),
    ),
    Cell("starved-whole-prompts", ("--chunked-prefill-size", "-1"), full=True),
    Cell("starved-page16-chunked", ("--page-size", "16", "--chunked-prefill-size", "64"), full=True),
    Cell("starved-no-overlap", ("--disable-overlap-schedule",), full=True),
    Cell("starved-retracting", ("--chunked-prefill-size", "64"), retract=True, full=True),
    Cell("starved-lpm", ("--schedule-policy", "lpm"), full=True),
    Cell("starved-mixed-chunk", ("--chunked-prefill-size", "64", "--enable-mixed-chunk"), full=True),
]  # fmt: skip


@pytest.fixture(
    params=[pytest.param(cell, id=cell.name, marks=[pytest.mark.full] if cell.full else []) for cell in CELLS]
)
def cell(request: pytest.FixtureRequest) -> Iterator[Cell]:
    yield request.param


def test_elora_equals_transformers(cell: Cell, golden: Golden, demo: Demo, tmp_path: Path) -> None:
    """Rounds over all prompts, in a new order each, until both kinds were evicted often enough."""
    pool = STARVED_POOL if cell.starved else "60000"
    with live.server(
        demo.model,
        *FP32, *cell.flags, "--max-total-tokens", pool, "--elora", "--elora-audit-interval", "25",
        "--lora-paths", *demo.lora_paths(),
        log_dir=tmp_path,
        env=live.clean_env(SGLANG_TEST_RETRACT="true" if cell.retract else "false"),
    ) as server:  # fmt: skip
        rng = random.Random(SEED)
        assert_equal(golden, ask_all(server, golden.prompts))
        if cell.starved:
            rounds = 1
            with Aborter(server, golden, SEED) as aborter:
                while (
                    min((state := elora_state(server)["done"])["kv_evictions"], state["adapter_evictions"])
                    < EVICTIONS
                ):
                    order = list(range(len(golden.prompts)))
                    rng.shuffle(order)
                    answers = ask_all(server, [golden.prompts[index] for index in order])
                    assert_equal(golden, answers, order)
                    rounds += 1
                    assert rounds < 40, f"evictions do not add up: {state}"
            assert aborter.aborted > 0
            print(f"{cell.name}: {rounds} rounds, {aborter.aborted} aborts, {state}")
        state = elora_state(server)
        print(cell.name, state)
        assert state["audits"] > 0 and state["audit_adapters_compared"] > 0
        assert state["audit_faults"] == 0
        assert server.post("/flush_cache").status == 200
        assert_equal(golden, ask_all(server, golden.prompts))
        assert server.alive()
