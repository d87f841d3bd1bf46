"""``python -m elora_sglang.eval reproduce``: the paper's experiments in simulated time, and its claims beside ours.

Three models, three workloads, three numbers of adapters; all systems and ablations at the grid's centre; skews,
drifts, thousands of adapters, sglang#13349's burst, and with ``--trace`` the gap to the clairvoyant reference on a real
trace. Finished cells are files in ``--state``; the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elora_sglang.eval.reproduction import claims, gap, plan, tables
from elora_sglang.eval.reproduction.scene import Turns
from elora_sglang.eval.support import reporting
from elora_sglang.eval.support.provenance import provenance
from elora_sglang.eval.support.state import State

AIM_HICACHE, AIM_STOCK, AIM_STOCK_P99, AIM_PEAK, AIM_MANY, AIM_BURST = 0.54, 0.30, 0.26, 1.8, 0.51, 2.0
#: Least share of the gap to close, by (recall, false positives) of hints.
AIM_GAP = {(0.0, 0.0): 0.6, (0.75, 0.0): 0.8, (1.0, 0.0): 0.95, (0.75, 0.1): 0.0}


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    parser = subparsers.add_parser("reproduce", help="the paper's experiments in simulated time")
    parser.add_argument(
        "--state", type=Path, default=Path(".eval-reproduce"), help="folder of finished cells"
    )
    parser.add_argument("--trace", type=Path, help="a trace with conversations (Mooncake) for the gaps")
    parser.add_argument(
        "--turns", type=int, default=Turns().reported, help="of a reported figure (default %(default)s)"
    )
    parser.add_argument(
        "--search-turns", type=int, default=Turns().search, help="of a step of a search (default %(default)s)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (default %(default)s)")
    parser.add_argument("--finished", action="store_true", help="show what is finished, compute nothing")
    parser.add_argument("--only", metavar="KINDS", help="only these kinds of tasks, by comma")
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)


#: Of cells on disk; another one finds none of the old.
LAYOUT = "cells 2"

_tasks: list[plan.Task] = []
_state: State | None = None


def _work(number: int) -> dict[str, Any]:
    """The cell of a task: its result, and when it was computed by which commit, in how many seconds."""
    assert _state is not None
    return dict(_state.cell(_cell(_tasks[number]), lambda: _measured(_tasks[number])))


def _measured(task: plan.Task) -> dict[str, Any]:
    begun = time.monotonic()
    result = task.work()
    return {
        "commit": provenance().get("commit"),
        "seconds": round(time.monotonic() - begun, 1),
        "result": result,
    }


def _cell(task: plan.Task) -> tuple[object, ...]:
    return (*task.key, LAYOUT)


def run(args: argparse.Namespace) -> int:
    """Run what is missing, print the claims; returns the exit status."""
    if args.trace is not None and not args.trace.exists():
        raise SystemExit(
            f"reproduce: {args.trace}: no such file; give --trace a conversation trace, or leave it out"
        )
    wanted = None if args.only is None else set(args.only.split(","))
    tasks = [
        task
        for task in plan.tasks(Turns(args.turns, args.search_turns), args.trace)
        if wanted is None or task.kind in wanted
    ]
    unknown = (wanted or set()) - {task.kind for task in tasks}
    if unknown:
        raise SystemExit(f"reproduce: --only {', '.join(sorted(unknown))}: no such kind of task")
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
    shown = list(tables.tables(results))
    if not shown:
        shown = [reporting.Table(f"{len(tasks)} tasks are done", ["results"], [])]
    return reporting.finish(
        args,
        shown,
        aims(results),
        {
            "finished": len(tasks),
            "cells_by_commits": commits,
            "cell_seconds": round(sum(cell["seconds"] for cell in found)),
            "reproduction": results,
        },
    )


def compute(tasks: Sequence[plan.Task], state: State, jobs: int) -> list[dict[str, Any]]:
    """Cells of all tasks, in order (see :func:`_work`); missing ones are computed by ``jobs`` processes."""
    global _tasks, _state  # forked workers inherit them
    _tasks, _state = list(tasks), state
    missing = [number for number, task in enumerate(tasks) if not state.has(*_cell(task))]
    with tqdm(total=len(tasks), initial=len(tasks) - len(missing), unit="task") as bar:
        if jobs < 2:
            for number in missing:
                bar.set_description(tasks[number].name)
                _work(number)
                bar.update()
        elif missing:
            with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
                waiting = {pool.submit(_work, number): number for number in missing}
                for done in as_completed(waiting):
                    done.result()
                    bar.set_description(tasks[waiting[done]].name)
                    bar.update()
    return [_work(number) for number in range(len(tasks))]


def aims(results: claims.Results) -> list[reporting.Aim]:
    """The project's own aims, over all scenes and loads; those whose results are there."""
    found = []

    def most(name: str, values: Sequence[float], aim: float) -> None:
        if values:
            value = statistics.fmean(values)
            found.append(reporting.Aim(name, value, f"<= {aim}", value <= aim))

    def least(name: str, values: Sequence[float], aim: float) -> None:
        if values:
            value = statistics.fmean(values)
            found.append(reporting.Aim(name, value, f">= {aim}", value >= aim))

    many = results.get("many", [])
    for kind, where in (("grid", "the grid"), ("scarce", "1/2 to 1/8 of the memory")):
        found_there = results.get(kind, [])
        for metric, base, of, aim in (
            (claims.mean_ttft, "hicache", "mean TTFT over tuned HiCache", AIM_HICACHE),
            (claims.mean_ttft, "vllm", "mean TTFT over stock", AIM_STOCK),
            (claims.p99_ttft, "vllm", "P99 TTFT over stock", AIM_STOCK_P99),
        ):
            most(f"{of}, {where}", claims.ratios(found_there, base, metric), aim)
        least(f"peak load over stock, {where}", claims.peak_ratios(found_there, "vllm"), AIM_PEAK)
    most(
        "mean TTFT over stock, 1000 and 2000 adapters",
        claims.ratios(many, "vllm", claims.mean_ttft),
        AIM_MANY,
    )
    for one in results.get("burst", []):
        parts = one["elora"]
        most(
            f"median TTFT, 16 adapters over 8, {parts['8']['requests']} requests each",
            [parts["16"]["p50"] / parts["8"]["p50"]], AIM_BURST,
        )  # fmt: skip
    gaps = results.get("gap", [])
    for (recall, false), aim in AIM_GAP.items():
        name = gap.label("elora", recall, false)
        least(f"gap closed by {name}", [gap.closed(one, name) for one in gaps], aim)
    return found
