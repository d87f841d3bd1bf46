"""Two tiers live: with a starved device pool and a host pool every token is as Transformers computes it.

As ``test_correctness``, and a run goes on until it has seen enough demotions, load-backs and prefetches. Links are
emulated and slow, so that copies really are late and a forward that did not wait for one would compute from
other bytes.
"""

from __future__ import annotations

import random
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from serve.test_correctness import (
    FP32,
    SEED,
    STARVED_POOL,
    Aborter,
    Golden,
    ask_all,
    assert_equal,
    elora_state,
    golden,
)
from support import live
from support.demo_paths import Demo

__all__ = ["golden"]  # the fixture

#: Gigabytes a second: a prefix of a hundred tokens takes about ten forwards of this model.
LINK = "0.02"


@dataclass(frozen=True)
class Cell:
    """One configuration, and how often what must have happened in it."""

    policy: str
    flags: tuple[str, ...] = ()
    demotions: int = 100
    load_backs: int = 100
    idle: int = 0
    host: str = "2x"
    full: bool = True


CELLS = [
    Cell(
        "elora",
        ("--chunked-prefill-size", "64", "--elora-idle-watermark", "1.0", "--elora-busy-watermark", "1.0"),
        demotions=500,
        load_backs=500,
        idle=100,
        full=False,
    ),
    Cell("elora", ("--page-size", "16", "--disable-overlap-schedule", "--elora-link-gbps", "0"), host="1x"),
    *(
        Cell(name)
        for name in (
            "paper", "paper-literal", "lru", "lfu", "slru", "rrip", "gdsf", "chameleon", "arc", "static",
        )
    ),
]  # fmt: skip


def rounds(
    server: live.LiveServer,
    golden: Golden,
    enough: Callable[[dict], bool],
    between: Callable[[], None] = lambda: None,
    limit: int = 60,
) -> tuple[int, dict]:
    """All prompts in a new order each round, with aborts, until ``enough`` has happened."""
    rng = random.Random(SEED)
    for count in range(1, limit + 1):
        order = list(range(len(golden.prompts)))
        rng.shuffle(order)
        with Aborter(server, golden, SEED + count):
            assert_equal(golden, ask_all(server, [golden.prompts[i] for i in order]), order)
        between()
        state = elora_state(server)
        if enough(state):
            return count, state
    raise AssertionError(f"not enough happened in {limit} rounds: {state}")


def leave_room(server: live.LiveServer, demo: Demo) -> None:
    """Unload the largest adapter after a use of it: the room that it leaves is for idle prefetch."""
    for _ in range(4):
        server.generate(input_ids=list(range(20, 40)), lora_path="code", max_new_tokens=1, timeout=120)
        assert server.post("/unload_lora_adapter", {"lora_name": "code"}).status == 200
        time.sleep(0.5)
        path = str(demo.adapters["code"])
        assert server.post("/load_lora_adapter", {"lora_name": "code", "lora_path": path}).status == 200


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(c, id="-".join((c.policy, *c.flags[:2])), marks=[pytest.mark.full] if c.full else [])
        for c in CELLS
    ],
)
def test_two_tiers_equal_transformers(cell: Cell, golden: Golden, demo: Demo, tmp_path: Path) -> None:
    """Token-identical, the auditor clean with every copy compared, no leak, and as much moved as must be."""
    link = () if "--elora-link-gbps" in cell.flags else ("--elora-link-gbps", LINK)
    with live.server(
        demo.model,
        *FP32, *cell.flags, *link, "--max-total-tokens", STARVED_POOL, "--elora", "--elora-policy", cell.policy,
        "--elora-host-memory", cell.host, "--elora-audit-interval", "25", "--enable-cache-report",
        "--lora-paths", *demo.lora_paths(),
        log_dir=tmp_path,
    ) as server:  # fmt: skip
        done, state = rounds(
            server,
            golden,
            lambda s: (
                s["done"]["demoted"] >= cell.demotions
                and s["done"]["load_backs"] >= cell.load_backs
                and min(s["done"]["idle_prefetches_kv"], s["done"]["idle_prefetches_adapter"]) >= cell.idle
            ),
            (lambda: leave_room(server, demo)) if cell.idle else (lambda: None),
        )
        print(f"{cell.policy}: {done} rounds, {state}")
        assert state["audit_faults"] == 0 and state["audit_copies_compared"] > 0
        assert state["done"]["tokens_host"] > 0
        assert cell.policy == "static" or state["invalid_kv_slots"] == 0
        assert server.post("/flush_cache").status == 200
        after = elora_state(server)
        assert after["host_free_slots"] + after["host_used_by_tree"] == after["host_slots"]
        assert_equal(golden, ask_all(server, golden.prompts))
        assert server.alive()


def test_hits_are_reported_by_tier(demo: Demo, tmp_path: Path) -> None:
    """``meta_info.cached_tokens_details`` of a request says how much of its prefix came from the host."""
    ids = [20 + i * 7 % 900 for i in range(160)]
    with live.server(
        demo.model,
        # Under LRU the oldest leaves for certain; policy `elora` may well keep it.
        *FP32, "--max-total-tokens", "1536", "--elora", "--elora-policy", "lru", "--elora-host-memory", "8x",
        "--enable-cache-report",
        "--elora-audit-interval", "25", "--lora-paths", *demo.lora_paths(),
        log_dir=tmp_path,
    ) as server:  # fmt: skip

        def ask(tokens: list[int]) -> dict:
            reply = server.generate(input_ids=tokens, lora_path="sql", max_new_tokens=4, timeout=120)
            return reply["meta_info"]["cached_tokens_details"] or {"device": 0, "host": 0}

        assert ask(ids)["host"] == 0
        near = ask([*ids, 5])
        assert near["device"] >= 159 and near["host"] == 0
        time.sleep(1.0)  # its backup
        for other in range(8):
            ask([1000 + other, *((3 + i * (other + 2)) % 900 for i in range(200))])
        far = ask([*ids, 6])
        print(near, far)
        assert far["host"] > 0 and far["device"] + far["host"] >= 159


#: Runs in the server's processes before anything else: every third copy and host allocation fails.
SABOTAGE = """
    import importlib.abc, importlib.util, sys

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "elora_sglang.runtime.transfers.engine":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module
            def exec_module(module):
                run(module)
                sabotage(module)
            spec.loader.exec_module = exec_module
            return spec

    def sabotage(module):
        from elora_sglang.runtime.pool.host import HostPool
        calls = {"n": 0}
        def every_third(function, fail):
            def wrapped(*args, **kwargs):
                calls["n"] += 1
                return fail() if calls["n"] % 3 == 0 else function(*args, **kwargs)
            return wrapped
        def refuse():
            raise module.TransferError("sabotaged")
        engine = module.TransferEngine
        engine.load = every_third(engine.load, refuse)
        engine.save = every_third(engine.save, refuse)
        HostPool.alloc = every_third(HostPool.alloc, lambda: None)

    sys.meta_path.insert(0, Finder())
"""


def test_failing_copies_cost_time_and_no_token(golden: Golden, demo: Demo, tmp_path: Path) -> None:
    """Host allocations and copies that fail: what they would have brought is recomputed, token for token."""
    folder = tmp_path / "sabotage"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(SABOTAGE))
    with live.server(
        demo.model,
        *FP32, "--max-total-tokens", STARVED_POOL, "--elora", "--elora-policy", "elora",
        "--elora-host-memory", "2x", "--elora-audit-interval", "25", "--lora-paths", *demo.lora_paths(),
        log_dir=tmp_path,
        env=live.clean_env(PYTHONPATH=str(folder)),
    ) as server:  # fmt: skip
        _, state = rounds(
            server, golden, lambda s: min(s["done"]["failed_transfers"], s["done"]["load_backs"]) >= 30
        )
        print(state)
        assert state["audit_faults"] == 0
        assert server.alive()


def test_a_live_run_replays(golden: Golden, demo: Demo, tmp_path: Path) -> None:
    """Two fresh cores fed the recorded stream of a live run take the live run's actions."""
    from elora_sglang.core.trace import replay

    trace = tmp_path / "trace.jsonl"
    with live.server(
        demo.model,
        *FP32, "--max-total-tokens", STARVED_POOL, "--elora", "--elora-policy", "elora",
        "--elora-host-memory", "2x", "--elora-trace-out", str(trace), "--lora-paths", *demo.lora_paths(),
        log_dir=tmp_path,
    ) as server:  # fmt: skip
        for _ in range(2):
            assert_equal(golden, ask_all(server, golden.prompts))
        state = elora_state(server)
        assert state["done"]["load_backs"] > 0
    lines = trace.read_text().splitlines()
    result = replay(lines, players=2)
    print(result)
    assert result.events > 1000 and result.mismatch is None


@pytest.mark.full
def test_two_tensor_parallel_ranks_decide_alike(golden: Golden, demo: Demo, tmp_path: Path) -> None:
    """Two scheduler processes with late copies of their own: the same events, the same actions, the right tokens."""
    trace = tmp_path / "trace.jsonl"
    with live.server(
        demo.model,
        *FP32, "--tp-size", "2", "--max-total-tokens", STARVED_POOL, "--elora", "--elora-policy", "elora",
        "--elora-host-memory", "2x", "--elora-link-gbps", LINK, "--elora-audit-interval", "25",
        "--elora-trace-out", str(trace), "--lora-paths", *demo.lora_paths(),
        log_dir=tmp_path,
    ) as server:  # fmt: skip
        done, state = rounds(
            server, golden, lambda s: min(s["done"]["demoted"], s["done"]["load_backs"]) >= 100
        )
        print(f"two ranks: {done} rounds, {state}")
        assert state["audit_faults"] == 0 and state["audit_copies_compared"] > 0
        time.sleep(2.0)  # both traces reach the disk every second
        ranks = [Path(f"{trace}{suffix}").read_text().splitlines()[:-1] for suffix in ("", ".rank1")]
        assert server.alive()
    events = min(map(len, ranks))
    differ = [i for i in range(events) if ranks[0][i] != ranks[1][i]]
    assert not differ, f"line {differ[0]}: {ranks[0][differ[0]]} and {ranks[1][differ[0]]}"
    assert events > 1000 and sum('["load",' in line for line in ranks[0][:events]) >= 50
