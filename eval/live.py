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
import signal
from dataclasses import asdict
from pathlib import Path

from elora_sglang.eval import server
from elora_sglang.eval.serving import comparison, model, report, scaled, sweep, systems
from elora_sglang.eval.serving.ground import GPU, Ground
from elora_sglang.eval.sim import machine as machines
from elora_sglang.eval.support import reporting
from elora_sglang.eval.support.state import State

DEFAULT = "stock,stock-overlap,hicache,static,lru,paper,elora"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    parser = subparsers.add_parser("live", help="live comparison under memory pressure, systems interleaved")
    add = parser.add_argument
    add(
        "--compare",
        default=DEFAULT,
        help=f"systems, by comma: {', '.join(systems.NAMES)} (default {DEFAULT})",
    )
    add("--workload", choices=scaled.names(), default="chat", help="traffic (default chat)")
    add("--rates", help="turns a second, by comma: every system at each of them, as the turns arrive")
    add("--peak", action="store_true", help="the highest rate of every system within --limit")
    add(
        "--limit",
        type=float,
        default=0.5,
        metavar="SECONDS",
        help="mean TTFT at the peak (default %(default)s)",
    )
    add("--adapters", type=int, default=16, help="with --rates or --peak (default %(default)s)")
    add("--quick", action="store_true", help="one working set, one load, short runs: within 15 minutes")
    add("--ablate", action="store_true", help="also elora without each of its parts")
    add(
        "--link-gbps",
        default="auto",
        help="emulated link, GB/s each way; auto: the GPU profile's link-to-compute ratio; 0: none (default auto)",
    )
    add("--profile", default=GPU, help="GPU profile by name or file (default %(default)s)")
    add(
        "--state", type=Path, default=Path(".eval-live"), help="folder of finished cells (default .eval-live)"
    )
    add(
        "--model", type=Path, default=None, help="folder of the evaluation model (default: model/ in --state)"
    )
    add("--device-tokens", type=int, help="device memory in KV tokens (default 16384, quick 8192)")
    add("--host-tokens", type=int, help="host memory in KV tokens (default 3 times the device's)")
    add("--running", type=int, default=8, help="requests running at once (default 8)")
    add("--ranks", default=None, help=f"LoRA ranks, by comma, in turn (default {model.RANKS})")
    add("--working-sets", help="times the device memory, by comma (default 2,4; quick 2)")
    add("--loads", help="shares of a baseline's own capacity, by comma (default 0.5,0.7,0.8; quick 0.7)")
    add("--repeats", type=int, help="interleaved repeats (default 3)")
    add("--seconds", type=float, help="measured seconds a load (default 60, quick 5)")
    add(
        "--warmup",
        type=float,
        help="seconds in which the live sessions come in, dropped (default: as prefilling their histories takes)",
    )
    add("--seed", type=int, default=1)
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)


def _numbers(text: str | None, default: tuple[float, ...]) -> tuple[float, ...]:
    return default if text is None else tuple(float(part) for part in text.split(","))


def _names(args: argparse.Namespace) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(args.compare.split(",")))
    unknown = [name for name in names if name not in systems.NAMES]
    if unknown:
        raise SystemExit(f"live: --compare {unknown[0]!r} is not one of {', '.join(systems.NAMES)}")
    return names


def settings(args: argparse.Namespace) -> comparison.Settings:
    """What the arguments ask for; SystemExit with one line where they make no sense."""
    names = _names(args)
    if "stock" not in names:
        raise SystemExit("live: --compare needs stock: loads are shares of its capacity")
    quick = args.quick
    device = args.device_tokens or (8192 if quick else 16384)
    repeats = args.repeats or 3
    seconds = args.seconds or (5.0 if quick else 60.0)
    state = args.state.absolute()
    return comparison.Settings(
        names=names,
        folder=(args.model or state / "model").absolute(),
        state=state,
        device_tokens=device,
        host_tokens=args.host_tokens or 3 * device,
        running=args.running,
        factors=_numbers(args.working_sets, (2.0,) if quick else (2.0, 4.0)),
        loads=_numbers(args.loads, (0.7,) if quick else (0.5, 0.7, 0.8)),
        repeats=repeats,
        warmup=args.warmup,
        seconds=seconds,
        tuning_seconds=min(seconds, 10.0 if quick else 30.0),
        seed=args.seed,
        quick=quick,
        ablate=args.ablate,
        link=args.link_gbps,
        ranks=tuple(int(rank) for rank in _numbers(args.ranks, model.RANKS)),
        gpu=machines.load(args.profile),
    )


def _sweep(args: argparse.Namespace) -> int:
    rates = _numbers(args.rates, ())
    if any(rate <= 0 for rate in rates):
        raise SystemExit(f"live: --rates takes turns a second above 0, got {args.rates}")
    names = _names(args)
    device = args.device_tokens or 10240
    ranks = tuple(int(rank) for rank in _numbers(args.ranks, model.RANKS))
    budget = systems.Budget(device, args.host_tokens or 3 * device, args.running, args.adapters, ranks)
    state = State(args.state.absolute())
    folder = (args.model or state.folder / "model").absolute()
    ground = Ground("live", folder, state, budget, args.link_gbps, machines.load(args.profile))
    seconds = args.seconds or (30.0 if args.quick else 60.0)
    run = sweep.Sweep(ground, names, args.workload, seconds, args.repeats or 1, args.limit, args.seed)
    try:
        ground.prepare()
        run.tune(rates[0] if rates else 1.0)
        peaks = run.peaks(rates[0] if rates else 1.0) if args.peak else {}
        cells = run.cells(rates)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"live: {error}") from error
    finally:
        ground.fleet.end()
    tables = []
    if peaks:
        found = [
            [name, f"{one.rate:.2f}", "" if one.failed is None else f"{one.failed:.2f}"]
            for name, one in peaks.items()
        ]
        what = f"{args.workload}: most turns a second with a mean TTFT of at most {args.limit:g} s"
        tables.append(reporting.Table(what, ["system", "peak", "too much"], found))
    if cells:
        what = f"{args.workload}: TTFT over rate, {seconds:g} s a run, {args.adapters} adapters"
        tables.append(reporting.Table(what, sweep.HEADER, sweep.rows(cells), "ttft-over-rate"))
    return reporting.finish(
        args, tables, [],
        {
            "title": f"Live servers on {args.workload}",
            "cells": cells,
            "peaks": {name: asdict(one) for name, one in peaks.items()},
            "chosen": {name: one.setting for name, one in run.chosen.items()},
            "budget": asdict(budget), "link_gbps": ground.link_gbps,
            "prefill_s_per_token": ground.prefill_s, "seed": args.seed, "seconds": seconds,
        },
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    # Ended from outside, it still takes its servers with it.
    signal.signal(signal.SIGTERM, lambda *_: server.end_with(143))
    if args.rates or args.peak:
        return _sweep(args)
    if args.workload != "chat":
        raise SystemExit(f"live: --workload {args.workload} is played at rates: add --rates LIST or --peak")
    chosen = settings(args)
    try:
        data = comparison.Comparison(chosen).run()
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"live: {error}") from error
    table = reporting.Table(report.title(chosen, data), report.HEADER, report.rows(data))
    return reporting.finish(args, [table], report.aims(data), report.plain(data))
