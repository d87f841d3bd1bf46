"""``python -m elora_sglang.eval reproduce``: the paper's experiments in simulated time, and its claims beside ours.

Three models, three workloads, three numbers of adapters; all systems and ablations at the grid's centre; skews,
drifts, thousands of adapters, sglang#13349's burst, and with ``--trace`` the gap to the clairvoyant reference on a real
trace. Finished cells are files in ``--state``; the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from elora_sglang.eval.reproduction import claims, gap, plan, tables
from elora_sglang.eval.reproduction.scene import Turns
from elora_sglang.eval.support import arguments, pool, reporting
from elora_sglang.eval.support.provenance import provenance
from elora_sglang.eval.support.state import State

AIM_HICACHE, AIM_STOCK, AIM_STOCK_P99, AIM_PEAK, AIM_MANY, AIM_BURST = 0.54, 0.30, 0.26, 1.8, 0.51, 2.0
#: Least share of the gap to close, by (recall, false positives) of hints.
AIM_GAP = {(0.0, 0.0): 0.6, (0.75, 0.0): 0.8, (1.0, 0.0): 0.95, (0.75, 0.1): 0.0}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    parser = subparsers.add_parser("reproduce", help="the paper's experiments in simulated time")
    add, usual, default = parser.add_argument, Turns(), "(default %(default)s)"
    add("--state", type=Path, default=Path(".eval-reproduce"), help="folder of finished cells")
    add("--trace", type=Path, help="a trace with conversations (Mooncake) for the gaps")
    add("--turns", type=int, default=usual.reported, help=f"of a reported figure {default}")
    add("--search-turns", type=int, default=usual.search, help=f"of a step of a search {default}")
    add("--jobs", type=int, default=2, help=f"processes {default}")
    add("--finished", action="store_true", help="show what is finished, compute nothing")
    add(
        "--only",
        metavar="KINDS",
        type=arguments.names(plan.KINDS),
        help="only these kinds of tasks, by comma",
    )
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)


#: Of cells on disk; another one finds none of the old.
LAYOUT = "cells 2"


def _cell(task: plan.Task) -> tuple[object, ...]:
    return (*task.key, LAYOUT)


def _measured(task: plan.Task) -> dict[str, Any]:
    """The result of a task, and when it was computed by which commit, in how many seconds."""
    begun = time.monotonic()
    result = task.work()
    seconds = round(time.monotonic() - begun, 1)
    return {"commit": provenance().get("commit"), "seconds": seconds, "result": result}


def run(args: argparse.Namespace) -> int:
    """Run what is missing, print the claims; returns the exit status."""
    if args.trace is not None and not args.trace.exists():
        raise SystemExit(
            f"reproduce: {args.trace}: no such file; give --trace a conversation trace, or leave it out"
        )
    planned = plan.tasks(Turns(args.turns, args.search_turns), args.trace)
    tasks = [task for task in planned if args.only is None or task.kind in args.only]
    if missing := set(args.only or ()) - {task.kind for task in tasks}:
        raise SystemExit(f"reproduce: --only {', '.join(sorted(missing))}: add --trace FILE")
    state = State(args.state)
    if args.finished:
        tasks = [task for task in tasks if state.has(*_cell(task))]
    found = compute(tasks, state, args.jobs)
    results: claims.Results = {}
    for task, cell in zip(tasks, found, strict=True):
        results.setdefault(task.kind, []).append(cell["result"])
    commits = sorted({str(cell["commit"]) for cell in found})
    if len(commits) > 1:
        reporting.progress(
            f"reproduce: the cells in {args.state} are of {len(commits)} commits ({', '.join(commits)}); remove the "
            "folder to measure all of them with this one"
        )
    shown = list(tables.tables(results)) or [reporting.Table(f"{len(tasks)} tasks are done", ["results"], [])]
    data = {
        "finished": len(tasks),
        "cells_by_commits": commits,
        "cell_seconds": round(sum(cell["seconds"] for cell in found)),
        "reproduction": results,
    }
    return reporting.finish(args, shown, aims(results), data)


def compute(tasks: Sequence[plan.Task], state: State, jobs: int) -> list[dict[str, Any]]:
    """Cells of all tasks, in order (see :func:`_measured`); missing ones are computed by ``jobs`` processes."""

    def cell(number: int) -> dict[str, Any]:
        return dict(state.cell(_cell(tasks[number]), lambda: _measured(tasks[number])))

    missing = [number for number, task in enumerate(tasks) if not state.has(*_cell(task))]
    pool.compute(cell, [task.name for task in tasks], missing, jobs, "task")
    return [cell(number) for number in range(len(tasks))]


def aims(results: claims.Results) -> list[reporting.Aim]:
    """The project's own aims, over all scenes and loads; those whose results are there."""
    at_most, at_least = reporting.Aim.at_most, reporting.Aim.at_least
    judged: list[tuple[Callable[[str, float, float], reporting.Aim], str, Sequence[float], float]] = []
    for kind, where in (("grid", "the grid"), ("scarce", "1/2 to 1/8 of the memory")):
        there = results.get(kind, [])
        for metric, base, of, aim in (
            (claims.mean_ttft, "hicache", "mean TTFT over tuned HiCache", AIM_HICACHE),
            (claims.mean_ttft, "vllm", "mean TTFT over stock", AIM_STOCK),
            (claims.p99_ttft, "vllm", "P99 TTFT over stock", AIM_STOCK_P99),
        ):
            judged.append((at_most, f"{of}, {where}", claims.ratios(there, base, metric), aim))
        peaks = claims.peak_ratios(there, "vllm")
        judged.append((at_least, f"peak load over stock, {where}", peaks, AIM_PEAK))
    many = claims.ratios(results.get("many", []), "vllm", claims.mean_ttft)
    judged.append((at_most, "mean TTFT over stock, 1000 and 2000 adapters", many, AIM_MANY))
    for parts in (one["elora"] for one in results.get("burst", [])):
        name = f"median TTFT, 16 adapters over 8, {parts['8']['requests']} requests each"
        judged.append((at_most, name, [parts["16"]["p50"] / parts["8"]["p50"]], AIM_BURST))
    for (recall, false), aim in AIM_GAP.items():
        name = gap.label("elora", recall, false)
        closed = [gap.closed(one, name) for one in results.get("gap", [])]
        judged.append((at_least, f"gap closed by {name}", closed, aim))
    return [judge(name, statistics.fmean(values), aim) for judge, name, values, aim in judged if values]
