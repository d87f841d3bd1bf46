"""``python -m elora_sglang.eval micro``: what one request costs in the tree, beside SGLang's own trees.

A request of 1,024 tokens, half of it cached and ending inside a node: match (with the split), lock, slots of
the prefix, insert, lock of the new end, slots of the whole row, unlock; on trees of 10^3, 10^5 and 10^6 nodes
and pages of 1 and 16 tokens, with real slot tensors. Then eviction, in calls that make room for half of it.

Every system lives in a process of its own and holds its trees of all sizes at once. Measurements go round:
a few requests on each size of each system, then again, so that a busy moment of the machine hits all of them.
Where the memory does not hold all systems at once, they are measured one after the other; the title says so.

The second part, ``--parts iteration``, is what a whole scheduler iteration costs in ELORA near memory pressure, with
two tiers, a waiting queue and copies in flight: :mod:`elora_sglang.eval.trees.iteration` says what is counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from elora_sglang.core.policies import policy_names
from elora_sglang.eval.support import arguments, estimates, reporting
from elora_sglang.eval.trees import iteration, worker
from elora_sglang.eval.trees.caches import SYSTEMS
from elora_sglang.eval.trees.process import Child
from elora_sglang.runtime.pool.host_size import available_bytes

PARTS = ("tree", "iteration")
AIM_NODES, AIM_MS = 100_000, 0.1
GROWTH_FROM, GROWTH_TO, AIM_GROWTH = 1_000, 1_000_000, 2.0
ROUND, EVICT_ROUNDS, EVICT_CALLS = 10, 4, 5
# Measured on CPython 3.11 with torch 2, rounded up: a node of the heaviest system, and what a process does not
# share with the one it was forked from.
BYTES_PER_NODE, BYTES_PER_PROCESS = 3_000, 500_000_000
BUILD_SECONDS_PER_NODE = 0.02

Samples = dict[tuple[str, int], dict[str, list[float]]]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    parser = subparsers.add_parser(
        "micro", help="cost of one request and one eviction in the tree, by its size"
    )
    add = parser.add_argument
    known, default = ", ".join(map(repr, SYSTEMS)), "(default %(default)s)"
    policies = list(iteration.POLICIES)
    add("--nodes", type=arguments.sizes, default="1000,100000,1000000", help=f"tree sizes {default}")
    add("--pages", type=arguments.sizes, default="1,16", help=f"page sizes {default}")
    add(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=list(SYSTEMS),
        metavar="NAME",
        help=f"which to measure: {known} (default all)",
    )
    add("--requests", type=int, default=200, help=f"measured requests a tree {default}")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default both)")
    add("--iteration-nodes", type=arguments.sizes, default="1000,100000", help=f"tree sizes there {default}")
    add("--iterations", type=int, default=4000, help=f"measured iterations {default}")
    add(
        "--policies",
        nargs="+",
        choices=policy_names(),
        default=policies,
        metavar="NAME",
        help=f"eviction policies for iterations (default {' '.join(policies)})",
    )
    add("--quick", action="store_true", help="1000 and 100000 nodes only, 60 requests, 1000 iterations")
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)  # fmt: skip


def fits_together(sizes: Sequence[int], systems: int, memory: int) -> bool:
    """Whether all systems can hold their trees at once in two thirds of ``memory`` bytes."""
    return systems * (BYTES_PER_PROCESS + BYTES_PER_NODE * sum(sizes)) < memory * 2 // 3


def measure(system: Child, what: Callable[..., list[float]], size: int, count: int) -> list[float]:
    """Samples in seconds."""
    system.order(what, size, count)
    samples = system.answer()
    if not isinstance(samples, list):
        raise SystemExit(f"micro: {system.name}, {what.__name__} at {size} nodes: {samples}")
    return samples


def measure_group(
    running: Sequence[Child], page_size: int, sizes: Sequence[int], requests: int
) -> tuple[Samples, dict[str, str]]:
    """Samples by (system, size), and why a system could not be compared."""
    started = time.perf_counter()
    names = ", ".join(system.name for system in running)
    reporting.progress(f"page size {page_size}: building {names} with {' and '.join(map(str, sizes))} nodes")
    for system in running:
        system.order(worker.build, system.name, page_size, list(sizes), requests)
    reasons = {system.name: system.answer() for system in running}
    running = [system for system in running if not reasons[system.name]]
    reporting.progress(f"page size {page_size}: built in {time.perf_counter() - started:.0f} s, measuring")
    samples: Samples = {(s.name, size): {"request": [], "evict": []} for s in running for size in sizes}
    rounds = [(worker.request, min(ROUND, requests - start)) for start in range(0, requests, ROUND)]
    for number, (what, count) in enumerate([*rounds, *[(worker.evict, EVICT_CALLS)] * EVICT_ROUNDS]):
        for size in sizes:
            for system in running:
                taken = measure(system, what, size, count)
                # The first round warms caches and the memory allocator up.
                samples[system.name, size][what.__name__] += taken if number else []
    return samples, {name: reason for name, reason in reasons.items() if reason}


def _summary(samples: Sequence[float]) -> dict[str, float]:
    tail = estimates.quantile(samples, 0.95, "higher")
    return {"median_ms": 1000 * statistics.median(samples), "p95_ms": 1000 * tail, "samples": len(samples)}


def _cells(summary: dict[str, float]) -> list[str]:
    return [f"{1000 * summary[key]:.1f}" for key in ("median_ms", "p95_ms")]


def _aims(results: Sequence[dict[str, Any]], pages: Sequence[int]) -> list[reporting.Aim]:
    medians = {
        (r["page_size"], r["nodes"]): r["request"]["median_ms"] for r in results if r["system"] == "elora"
    }
    at_most, aims = reporting.Aim.at_most, []
    for page in pages:
        at, first, last = (medians.get((page, nodes)) for nodes in (AIM_NODES, GROWTH_FROM, GROWTH_TO))
        if at is not None:
            aims.append(at_most(f"ms a request at {AIM_NODES} nodes, page size {page}", at, AIM_MS))
        if first and last:
            name = f"growth from {GROWTH_FROM} to {GROWTH_TO} nodes, page size {page}"
            aims.append(at_most(name, last / first, AIM_GROWTH))
    return aims


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    tables: list[reporting.Table] = []
    aims: list[reporting.Aim] = []
    data: dict[str, Any] = {}
    if "tree" in args.parts:
        found = _tree_part(args)
        tables.append(_table(found))
        aims += _aims(found["results"], args.pages)
        data |= found
    if "iteration" in args.parts:
        count = min(args.iterations, 1000) if args.quick else args.iterations
        iterations = iteration.measure_all(args.policies, args.iteration_nodes, count)
        tables.append(iteration.table(iterations))
        aims += iteration.aims(iterations)
        data["iterations"] = iterations
    return reporting.finish(args, tables, aims, data)


def _tree_part(args: argparse.Namespace) -> dict[str, Any]:
    sizes, requests = args.nodes, args.requests
    if args.quick:
        sizes, requests = [size for size in sizes if size <= AIM_NODES] or sizes[:1], min(requests, 60)
    chats = len(worker.CHAT_ENDS) * requests
    if requests <= ROUND:
        raise SystemExit(f"micro: --requests must be above {ROUND} (so many are warm-up), got {requests}")
    if sizes[0] < chats:
        raise SystemExit(f"micro: {requests} requests need trees of at least {chats} nodes, got {sizes[0]}")
    together = fits_together(sizes, len(args.systems), available_bytes())
    groups = [args.systems] if together else [[name] for name in args.systems]
    results: list[dict[str, Any]] = []
    missing: list[dict[str, Any]] = []
    for names in groups:
        running = [Child(name, 900 + BUILD_SECONDS_PER_NODE * sum(sizes)) for name in names]
        for page in args.pages:
            samples, reasons = measure_group(running, page, sizes, requests)
            missing += [{"system": n, "page_size": page, "not_compared": why} for n, why in reasons.items()]
            for (name, size), taken in samples.items():
                entry = {"system": name, "page_size": page, "nodes": size}
                results.append(entry | {what: _summary(values) for what, values in taken.items()})
        for system in running:
            system.close()
    results.sort(key=lambda r: (r["page_size"], SYSTEMS.index(r["system"]), r["nodes"]))
    return {"results": results, "not_compared": missing, "interleaved": together, "requests": requests}


def _table(found: dict[str, Any]) -> reporting.Table:
    rows = [
        [r["system"], r["page_size"], r["nodes"], *_cells(r["request"]), *_cells(r["evict"])]
        for r in found["results"]
    ]
    rows += [
        [m["system"], m["page_size"], "not compared:", m["not_compared"], "", "", ""]
        for m in found["not_compared"]
    ]
    how = "in turn" if found["interleaved"] else "one after the other, for want of memory"
    title = (
        f"One request of {worker.REQUEST_TOKENS} tokens in the tree, {worker.SHARED_TOKENS} of them cached; "
        f"systems measured {how}"
    )
    header = ["system", "page", "nodes", "request µs", "p95", "evict µs/victim", "p95"]
    return reporting.Table(title, header, rows, "tree")
