"""``python -m elora_sglang.eval live``: stock SGLang, HiCache and ELORA on one chat workload under memory pressure.

Every system gets the same bytes on the device (slot buffers count) and on the host (SGLang's CPU copies of adapters
count), the same attention, and the same emulated link between host and device. ``stock``, ``hicache`` and ``static``
are tuned first, on a seed that is not reported. Then all servers serve the same seeded sessions in turn, the idle ones
stopped, caches emptied in between, what was sent during the warm-up dropped. Every finished cell is a file in
``--state``; the same command goes on where it was interrupted.

With ``--rates`` or ``--peak`` the systems play one of the paper's three workloads instead (in the size of the
evaluation model) as it arrives, whatever they can do: TTFT over rates, and the peak load at a TTFT limit by bisection.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from elora_sglang.eval.serving import chat, comparison, launch, paper_traffic, rates, report
from elora_sglang.eval.serving import evaluation_model as model
from elora_sglang.eval.serving.rig import Rig
from elora_sglang.eval.serving.rig import add_arguments as add_rig
from elora_sglang.eval.support import arguments, reporting

DEFAULT = "stock,stock-overlap,hicache,static,lru,paper,elora"
RATES_DEVICE_TOKENS, DEVICE_TOKENS, QUICK_DEVICE_TOKENS = 10240, 16384, 8192


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    parser = subparsers.add_parser("live", help="live comparison under memory pressure, systems interleaved")
    add, default = parser.add_argument, "(default %(default)s)"
    positive, positives, count = arguments.positive, arguments.positives, arguments.count
    known, listed = arguments.names(launch.NAMES), ", ".join(launch.NAMES)
    add("--compare", default=DEFAULT, type=known, help=f"systems, by comma: {listed} {default}")
    add("--workload", choices=list(paper_traffic.SCALED), default="chat", help="traffic (default chat)")
    asked = "turns a second, by comma: every system at each of them, as they arrive"
    add("--rates", type=positives, help=asked)
    add("--peak", action="store_true", help="the highest rate of every system within --limit")
    add("--limit", type=positive, default=0.5, metavar="SECONDS", help=f"mean TTFT at the peak {default}")
    add("--adapters", type=count, default=16, help=f"with --rates or --peak {default}")
    add("--quick", action="store_true", help="one working set, one load, short runs: within 15 minutes")
    add("--ablate", action="store_true", help="also elora without each of its parts")
    add("--ranks", type=arguments.counts, default=model.RANKS, help=f"LoRA ranks, by comma {default}")
    add("--working-sets", type=positives, help="times the device memory, by comma (default 2,4; quick 2)")
    add("--loads", type=positives, help="shares of a baseline's capacity (default 0.5,0.7,0.8; quick 0.7)")
    add("--repeats", type=count, help="interleaved repeats (default 3; at rates 1)")
    add("--seconds", type=positive, help="measured seconds a load (default 60, quick 5; at rates quick 30)")
    late = (
        "seconds in which the live sessions come in, dropped (default: as prefilling their histories takes)"
    )
    add("--warmup", type=arguments.number, help=late)
    add_rig(parser, ".eval-live", "16384, quick 8192, at rates 10240")
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)


def settings(args: argparse.Namespace) -> comparison.Settings:
    """What the arguments ask for; SystemExit with one line where they make no sense."""
    if "stock" not in args.compare:
        raise SystemExit("live: --compare needs stock: loads are shares of its capacity")
    quick = args.quick
    seconds = args.seconds or (5.0 if quick else 60.0)
    return comparison.Settings(
        names=args.compare,
        factors=args.working_sets or ((2.0,) if quick else (2.0, 4.0)),
        loads=args.loads or ((0.7,) if quick else (0.5, 0.7, 0.8)),
        repeats=args.repeats or 3,
        warmup=args.warmup,
        seconds=seconds,
        tuning_seconds=min(seconds, 10.0 if quick else 30.0),
        seed=args.seed,
        quick=quick,
        ablate=args.ablate,
    )


def _at_shares(args: argparse.Namespace) -> int:
    """Loads are shares of a baseline's capacity."""
    chosen = settings(args)
    device = args.device_tokens or (QUICK_DEVICE_TOKENS if args.quick else DEVICE_TOKENS)
    each = comparison.adapter_tokens(args.ranks)
    most = max(chat.size(int(factor * device), each)[0] for factor in chosen.factors)
    with Rig(args, device, most, args.ranks) as rig:
        data = comparison.Comparison(chosen, rig).run()
    aims = report.aims(data)
    table = reporting.Table(report.title(data), report.HEADER, report.rows(data), "live-comparison")
    plain = {key: report.without_answers(data[key]) for key in ("cells", "ablations")}
    return reporting.finish(args, [table], aims, data | plain | {"answers": report.answers(data)})


def _at_rates(args: argparse.Namespace) -> int:
    """Turns come as the workload has them."""
    seconds, listed = args.seconds or (30.0 if args.quick else 60.0), args.rates or ()
    first = listed[0] if listed else 1.0
    with Rig(args, RATES_DEVICE_TOKENS, ranks=args.ranks) as rig:
        run = rates.Rates(rig, args.compare, args.workload, seconds, args.repeats or 1, args.limit, args.seed)
        run.tune(first)
        peaks = run.peaks(first) if args.peak else {}
        cells = run.cells(listed)
    tables = []
    if peaks:
        found = [
            [name, f"{one.rate:.2f}", "" if one.failed is None else f"{one.failed:.2f}"]
            for name, one in peaks.items()
        ]
        what = f"{args.workload}: most turns a second with a mean TTFT of at most {args.limit:g} s"
        tables.append(reporting.Table(what, ["system", "peak", "too much"], found, "live-peaks"))
    if cells:
        what = f"{args.workload}: TTFT over rate, {seconds:g} s a run, {args.adapters} adapters"
        tables.append(reporting.Table(what, rates.HEADER, rates.rows(cells), "ttft-over-rate"))
    data = {
        "title": f"Live servers on {args.workload}",
        "cells": report.without_answers(cells),
        "peaks": {name: asdict(one) for name, one in peaks.items()},
        "chosen": {name: one.setting for name, one in run.chosen.items()},
        "seed": args.seed,
        "seconds": seconds,
    }
    return reporting.finish(args, tables, [], data | rig.about())


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    at_rates = args.rates or args.peak
    if args.workload != "chat" and not at_rates:
        raise SystemExit(f"live: --workload {args.workload} is played at rates: add --rates LIST or --peak")
    try:
        return _at_rates(args) if at_rates else _at_shares(args)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"live: {error}") from error
