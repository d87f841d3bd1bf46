"""How long ELORA takes of a scheduler iteration: :mod:`.life` in a process of its own, timed call by call.

In the figure is every call that SGLang makes of ELORA in an iteration, as wall time: the tick (books, policy, plan,
and carrying the plan out: slots of both tiers, copies launched and polled), ``enqueued``, ``ready``, ``match_prefix``,
the locks, ``adapters.load``, ``init_load_back``, ``admitted``, evictions for prompts and decoding, ``before_forward``,
both checkpoints, ``on_release``. "Deciding" is the part spent in the events of the cache manager, ``core/``; the rest
executes.

Not in it: SGLang's own work (allocating, request rows, batches), the prefill pass itself (``EloraPrefillAdder`` and who
may pass whom), reading adapters' files and writing their weights, waits inside the forward, and tensor-parallel
broadcasts. Slots have 32 bytes and one layer, so copies cost little more
than their bookkeeping; on a GPU each launches kernels in every layer instead.

The collector is treated as SGLang treats it: its HTTP server posts ``/freeze_gc`` after the warm-up
(``_freeze_gc_after_server_warmup``), which is ``gc.freeze()`` in the scheduler; thresholds stay Python's, and the tree,
which grows afterwards, is walked by full collections. They count where they fall.

Aims are judged by wall time. Beside it stands the processor's time of the same calls, which others on the machine
hardly move.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from elora_sglang.eval.support import estimates, reporting
from elora_sglang.eval.trees import life as lives
from elora_sglang.eval.trees import process

POLICIES = ("elora", "lru")
AIM_NODES, AIM_MS = 100_000, 1.0
#: Iterations before the collector is frozen, and between growing and measuring.
WARM_UP, SETTLE = 5, 400
LEAST_NODES, LEAST_ITERATIONS = 500, 100
#: A tree of so many nodes grows in a second, at worst.
SLOWEST_GROWTH = 100


def grow(policy: str, nodes: int) -> lives.Life:
    """A life whose host tier has been full for a while, in its usual rhythm. Freezes the collector on its way."""
    life = lives.Life(policy, nodes)
    for _ in range(WARM_UP):
        life.step(hurry=True)
    process.freeze()
    while life.cache.stats.host_evicted < lives.ADAPTERS:
        life.step(hurry=True)
    for _ in range(SETTLE):
        life.step()
    return life


def measure(life: lives.Life, iterations: int) -> dict[str, Any]:
    """Figures of the next ``iterations`` ones, in milliseconds; goes on with the life.

    Raises ``AssertionError`` if slots leaked meanwhile.
    """
    before, began = _counts(life), gc.get_stats()[2]["collections"]
    life.spent.clear()
    running = waiting = 0
    for _ in range(iterations):
        life.step()
        running, waiting = running + len(life.running), waiting + len(life.waiting)
    if life.balance():
        raise AssertionError(f"{life.balance()} slots belong to nobody")
    after = _counts(life)
    spent = [asdict(one) for one in life.spent]
    return {
        "policy": life.policy,
        "nodes": life.nodes,
        "tree_nodes": life.cache.tree.nodes,
        "iterations": iterations,
        "running": running / iterations,
        "waiting": waiting / iterations,
        "did": {name: count - before[name] for name, count in after.items() if count > before[name]},
        "full_collections": gc.get_stats()[2]["collections"] - began,
        **{part: _summary([one[part] for one in spent]) for part in spent[0]},
    }


def _counts(life: lives.Life) -> dict[str, int]:
    counts = {"requests": life.finished, "stalled": life.stalled}
    return counts | asdict(life.cache.stats)


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99, most = estimates.quantiles(seconds, (0.5, 0.99, 1.0), "higher")
    mean = statistics.fmean(seconds)
    return {"mean_ms": 1000 * mean, "p50_ms": 1000 * p50, "p99_ms": 1000 * p99, "max_ms": 1000 * most}


def grown_and_measured(policy: str, nodes: int, iterations: int) -> dict[str, Any]:
    """:func:`measure` of a life that :func:`grow` gives."""
    return measure(grow(policy, nodes), iterations)


def in_a_process(policy: str, nodes: int, iterations: int) -> dict[str, Any]:
    """The same in a process of its own. Raises ``SystemExit`` with the reason if it fails."""
    started = time.perf_counter()
    child = process.Child(policy, 600 + nodes / SLOWEST_GROWTH + iterations)
    child.order(grown_and_measured, policy, nodes, iterations)
    found = child.answer()
    child.close()
    if not isinstance(found, dict):
        raise SystemExit(f"micro: an iteration under {policy} at {nodes} nodes: {found}")
    reporting.progress(f"{policy}, {nodes} nodes: measured after {time.perf_counter() - started:.0f} s")
    return found


def measure_all(policies: Sequence[str], sizes: Sequence[int], iterations: int) -> list[dict[str, Any]]:
    """Figures of every policy at every size, one after the other.

    Raises ``SystemExit`` for sizes or counts that show nothing.
    """
    if min(sizes) < LEAST_NODES or iterations < LEAST_ITERATIONS:
        raise SystemExit(
            f"micro: iterations need trees of at least {LEAST_NODES} nodes and at least {LEAST_ITERATIONS} of them, "
            f"got {min(sizes)} and {iterations}"
        )
    return [in_a_process(policy, size, iterations) for size in sizes for policy in policies]


def aims(results: Sequence[dict[str, Any]]) -> list[reporting.Aim]:
    """P99 at ``AIM_NODES``, of all and of deciding alone, per policy."""
    return [
        reporting.Aim.at_most(
            f"P99 ms an iteration {name} at {AIM_NODES} nodes, policy {result['policy']}",
            result[part]["p99_ms"],
            AIM_MS,
        )
        for result in results
        if result["nodes"] == AIM_NODES
        for part, name in (("total", "in ELORA"), ("deciding", "deciding alone"))
    ]


def table(results: Sequence[dict[str, Any]]) -> reporting.Table:
    """One row per policy and size."""
    columns = [(part, which) for part in ("total", "deciding") for which in ("p50", "p99", "max")]
    columns += [(f"{part}_cpu", "p99") for part in ("total", "deciding")]
    header = [
        "policy", "nodes", "all P50 ms", "P99", "max", "deciding P50", "P99", "max", "CPU P99: all", "deciding",
    ]  # fmt: skip
    rows = [
        [r["policy"], r["nodes"], *(f"{r[part][f'{which}_ms']:.2f}" for part, which in columns)]
        for r in results
    ]
    title = (
        f"A scheduler iteration in ELORA, decisions and their execution, near memory pressure: {lives.RUNNING} "
        f"requests run, about as many wait, {lives.ADAPTERS} adapters, two tiers"
    )
    return reporting.Table(title, header, rows, "iterations")
