"""``python -m elora_sglang.eval workload``: what a workload is like, and the workload as a file.

A workload is made by a generator (``workload chat --rate 8``) or read from a trace or a saved workload
(``workload --trace FILE``). The table says how many sessions and turns it has, how long prompts and answers are, how
its adapters are used, what it offers a second, and how much of its prompts a cache that forgets nothing would find:
no policy can find more. ``--out FILE`` writes it, one session a line, to be diffed and played again with ``--trace``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import Any

from elora_sglang.eval.support import arguments, reporting
from elora_sglang.eval.workloads import GENERATORS, description, file
from elora_sglang.eval.workloads import arguments as workload_arguments
from elora_sglang.eval.workloads.description import Description
from elora_sglang.eval.workloads.model import Workload, WorkloadError


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    parser = subparsers.add_parser(
        "workload",
        help="make, read, describe and save workloads",
        description=f"Workloads:\n{workload_arguments.about_generators()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("workload", nargs="?", metavar="NAME", help=", ".join(GENERATORS))
    workload_arguments.add_arguments(parser)
    parser.add_argument("--out", metavar="FILE", help="write it here; FILE.gz is compressed")
    block = "block of the cache (default %(default)s)"
    parser.add_argument("--block-tokens", type=arguments.count, default=64, help=block)
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write and describe; returns the exit status. A workload that cannot be made ends it with one line."""
    started = time.monotonic()
    try:
        found = workload_arguments.workload(args)
        if args.out:
            file.write(found, args.out)
            reporting.progress(f"wrote {args.out} in {time.monotonic() - started:.1f} s")
            found = file.read(args.out)
        measured = description.measure(found, args.block_tokens)
    except WorkloadError as error:
        raise SystemExit(f"workload: {error}") from None
    if measured is None:
        raise SystemExit("workload: no sessions; make the duration, the rate or the share of sessions larger")
    header = found.header
    reporting.progress(f"read {measured.turns} turns in {time.monotonic() - started:.1f} s")
    data: dict[str, Any] = {"name": header.name, "seed": header.seed, "parameters": dict(header.parameters)}
    title, columns = (
        f"Workload {header.name}, seed {header.seed}",
        ["", "", "mean", "P50", "P95", "P99", "max"],
    )
    table = reporting.Table(title, columns, rows(found, measured), "workload")
    return reporting.finish(args, [table], [], {**data, "figures": asdict(measured)})


def rows(workload: Workload, measured: Description) -> list[list[object]]:
    """The table's rows: a name and a value, for lengths the percentiles."""
    ranks = ",".join(map(str, sorted({adapter.rank for adapter in workload.header.adapters})))
    found = {
        "sessions": f"{measured.sessions:,}",
        "turns": f"{measured.turns:,}",
        "seconds to the last known arrival": f"{measured.span_s:,.1f}",
        "turns a second": f"{measured.turn_rate:.3g}",
        "prompt tokens a second": f"{measured.prompt_rate:,.0f}",
        "answer tokens a second": f"{measured.answer_rate:,.0f}",
        "adapters used, of": f"{measured.adapters_used} of {measured.adapters_listed}",
        "LoRA ranks": ranks or "-",
        "skew over the run (fitted)": f"{measured.skew:.2f}",
        f"full prompt blocks of {measured.block_tokens}": f"{measured.full_blocks:,}",
        "found by an infinite cache": f"{measured.full_hit:.1%}",
        "with each prompt's last, partial block": f"{measured.block_hit:.1%}",
        "distinct tokens in full blocks": f"{measured.distinct_tokens:,}",
    }
    lengths = {
        "prompt tokens": measured.prompt,
        "of them new in the session": measured.new,
        "answer tokens": measured.answer,
    }
    shown: list[list[object]] = [[name, value, "", "", "", "", ""] for name, value in found.items()]
    for name, one in lengths.items():
        percentiles = (f"{value:,}" for value in (one.p50, one.p95, one.p99, one.most))
        shown.append([name, "", f"{one.mean:,.1f}", *percentiles])
    return shown
