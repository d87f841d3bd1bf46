"""Every token of ``--elora`` equals Transformers with merged weights and stock SGLang LoRA.

fp32 and greedy. The golden answers come from a process that never imports SGLang. Small pools make
adapters and KV leave all the time; a run goes on until it has seen enough evictions of each kind, with
the auditor looking on and SGLang's own strict leak check at its default.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import live
from support.demo_paths import Demo
from support.golden_answers import (
    FP32,
    SEED,
    STARVED_POOL,
    Aborter,
    Golden,
    ask_all,
    assert_equal,
    elora_state,
)

from elora_sglang.eval.serving.launch import adapters_for_stock

#: Evictions of each kind that a starved cell must have seen.
EVICTIONS = 500


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
