"""``python -m elora_sglang.eval simulate``: systems and policies side by side in simulated time.

Every system serves the same workload with the same device and host memory on the same machine profile; ELORA's
policies run in the very objects that serve (``core/``). Baselines with a knob (slot buffers, a fixed share) get a
sweep, and their best is shown. *restore s* is the cost that gaps are measured in: seconds to bring back, by copy, file
or recomputing, what an infinite device would have had. *gap* is the share of the way from LRU to the clairvoyant
reference; *x bound* is the cost over a lower bound that no policy can reach (:mod:`elora_sglang.eval.sim.bound`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from typing import Any

from elora_sglang.eval.sim import machine as machines
from elora_sglang.eval.sim import systems
from elora_sglang.eval.sim.bound import lower_bound
from elora_sglang.eval.sim.future import foresee
from elora_sglang.eval.sim.study import Job, Study, best_of, gap_closed, jobs_of, run_all
from elora_sglang.eval.sim.traffic import HintQuality
from elora_sglang.eval.support import reporting
from elora_sglang.eval.workloads import GENERATORS, arguments, figures
from elora_sglang.eval.workloads.model import Workload, WorkloadError

DEFAULT_SYSTEMS = "lru,paper,elora,clairvoyant"
#: Host memory that nothing can fill.
ENDLESS = 10**12
#: ELORA may be this share slower than the best policy and still count as "not worse".
TIE = 0.02


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    known = systems.systems()
    lines = "\n".join(f"  {one.name:14} {one.line}" for one in known.values())
    parser = subparsers.add_parser(
        "simulate",
        help="systems and policies side by side in simulated time",
        description=f"Workloads:\n{arguments.about_generators()}\n\nSystems:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workload", metavar="NAME", help=", ".join(GENERATORS))
    arguments.add_arguments(parser)
    parser.add_argument(
        "--policies", "--systems", dest="systems", default=DEFAULT_SYSTEMS, metavar="LIST",
        help=f"systems and policies, by comma (default {DEFAULT_SYSTEMS})",
    )  # fmt: skip
    parser.add_argument(
        "--profile", default="h800-llama-8b", metavar="P",
        help=f"machine and model: a JSON file, or one of {', '.join(machines.names())} (default %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", metavar="LIST", help="device memory in shares of the footprint (default: the profile's)"
    )
    parser.add_argument(
        "--host",
        default=None,
        metavar="LIST",
        help="host memory over device memory, inf for endless (default 4, or the profile's)",
    )
    parser.add_argument("--block-tokens", type=int, default=64, help="tokens of a slot (default %(default)s)")
    parser.add_argument(
        "--warmup",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of the time, not counted (default %(default)s)",
    )
    parser.add_argument("--hint-recall", type=float, default=0.0, help="share of last turns that say so")
    parser.add_argument("--hint-false", type=float, default=0.0, help="share of other turns that say so, too")
    parser.add_argument(
        "--series",
        action="store_true",
        help="with --json: also what `report` draws over time and as distributions",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (default %(default)s)")
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run all jobs and print a table for each size of memory; returns the exit status."""
    try:
        workload = arguments.workload(args)
        measured = figures.measure(workload, args.block_tokens)
        machine = machines.load(args.profile)
    except (WorkloadError, machines.MachineError) as error:
        raise SystemExit(f"simulate: {error}") from None
    if measured is None:
        raise SystemExit("simulate: no sessions; make the duration, the rate or the share of sessions larger")
    names = [name for name in args.systems.split(",") if name]
    unknown = [name for name in names if name not in systems.systems()]
    if unknown or not names:
        known = ", ".join(systems.systems())
        raise SystemExit(f"simulate: unknown system {', '.join(unknown) or '(none)'}; there are: {known}")
    sizes = list(_sizes(args, machine, workload, measured))
    future = foresee(workload, args.block_tokens) if systems.CLAIRVOYANT in names else None
    hints = HintQuality(args.hint_recall, args.hint_false, workload.header.seed)
    warmup_s = args.warmup * measured.span_s
    study = Study(workload, machine, args.block_tokens, warmup_s, hints, future, args.series)
    try:
        jobs = [
            job
            for label, device, host in sizes
            for name in names
            for job in jobs_of(study, name, label, device, host)
        ]
    except ValueError as error:
        raise SystemExit(f"simulate: {error}") from None
    found = run_all(study, jobs, args.jobs)
    speed = 60 * len(jobs) * measured.turns / sum(values["wall_s"] for values in found.values())
    reporting.progress(f"{len(jobs)} runs, {speed:,.0f} requests a minute on one core")
    header = workload.header
    title = f"{header.name} on {machine.name}, {measured.turns:,} turns, blocks of {args.block_tokens}"
    tables: list[reporting.Table] = []
    data, aims = [], []
    for label, device, host in sizes:
        best = {name: _with_knobs(*best_of(found, name, label)) for name in names}
        bound = None
        if future is not None:
            slots = {
                a.name: machine.adapter_slots(a.rank, args.block_tokens) for a in workload.header.adapters
            }
            bound = lower_bound(
                future, machine.costs(args.block_tokens), slots,
                device_slots=device, host_slots=host, warmup_s=warmup_s,
            )  # fmt: skip
        least = None if bound is None else bound.least
        what = f"{label}: {device:,} device slots, {_slots(host)} host slots"
        what = what if tables else f"{title}\n\n{what}"
        tables.append(reporting.Table(what, HEADER, rows(best, least)))
        data.append(
            {
                "memory": label,
                "device_slots": device,
                "host_slots": host,
                "bound_s": least,
                "systems": best,
            }
        )
        aims += _aims(label, best)
    return reporting.finish(
        args, tables, aims,
        {
            "workload": {"name": header.name, "seed": header.seed, "parameters": dict(header.parameters)},
            "machine": machine.name, "block_tokens": args.block_tokens, "warmup_s": warmup_s,
            "hints": {"recall": hints.recall, "false": hints.false}, "sizes": data,
            "requests_a_minute": speed,
        },
    )  # fmt: skip


HEADER = (
    "system", "knob", "TTFT ms", "P50", "P95", "P99", "TPOT", "KV dev %", "host %", "LoRA dev %", "host %",
    "GB in", "GB out", "invalid %", "restore s", "gap %", "x bound",
)  # fmt: skip


def _slots(count: int) -> str:
    return "endless" if count >= ENDLESS else f"{count:,}"


def _sizes(
    args: argparse.Namespace, machine: machines.Machine, workload: Workload, measured: figures.Figures
) -> Iterator[tuple[str, int, int]]:
    """(label, device slots, host slots) of every size asked for."""
    slot = machine.kv_bytes_per_token * args.block_tokens
    footprint = measured.distinct_tokens // args.block_tokens + sum(
        machine.adapter_slots(adapter.rank, args.block_tokens) for adapter in workload.header.adapters
    )
    shares = _numbers(args.memory, "--memory") if args.memory else [None]
    default = "4" if args.memory else str(machine.host_bytes / machine.device_bytes)
    for share in shares:
        device = int(machine.device_bytes // slot if share is None else share * footprint)
        for times in _numbers(args.host or default, "--host"):
            host = ENDLESS if math.isinf(times) else int(times * device)
            what = "the profile's memory" if share is None else f"{share:.0%} of the footprint"
            yield f"{what}, host {times:.3g}x", device, host


def _numbers(text: str, flag: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or any(number < 0 or math.isnan(number) for number in found):
        raise SystemExit(f"simulate: {flag} takes numbers by comma, got {text!r}")
    return found


def _with_knobs(job: Job, values: dict[str, Any]) -> dict[str, Any]:
    return {"knobs": dict(job.knobs), **values}


def rows(found: dict[str, dict[str, Any]], bound: float | None) -> list[list[object]]:
    """One row a system, under :data:`HEADER`; ``bound`` in seconds, if it is known."""
    return [_row(name, values, found, bound) for name, values in found.items()]


def _row(
    name: str, values: dict[str, Any], found: dict[str, dict[str, Any]], bound: float | None
) -> list[object]:
    ttft, kv, adapters, moved = values["ttft"], values["kv_hits"], values["adapter_hits"], values["bytes"]
    gap = gap_closed(values, found)
    return [
        name,
        " ".join(f"{value}" for value in values["knobs"].values()),
        *(f"{1000 * ttft[key]:.1f}" for key in ("mean", "p50", "p95", "p99")),
        f"{1000 * values['tpot']['mean']:.1f}",
        *(f"{100 * kv[tier]:.1f}" for tier in ("device", "host")),
        *(f"{100 * adapters[tier]:.1f}" for tier in ("device", "host")),
        f"{moved['load'] / 1e9:.1f}",
        f"{moved['save'] / 1e9:.1f}",
        f"{100 * values['invalid_kv']:.1f}",
        f"{values['restore_s']:.1f}",
        "" if gap is None else f"{100 * gap:.0f}",
        "" if not bound or values["refused"] else f"{values['restore_s'] / bound:.2f}",
    ]


def _aims(label: str, best: dict[str, dict[str, Any]]) -> list[reporting.Aim]:
    if "elora" not in best or len(best) < 2:
        return []
    others = {
        name: values["ttft"]["mean"]
        for name, values in best.items()
        if name not in ("elora", systems.CLAIRVOYANT)
    }
    if not others:
        return []
    first = min(others, key=lambda name: (others[name], name))
    ratio = best["elora"]["ttft"]["mean"] / others[first] if others[first] else 1.0
    name = f"{label}: elora's mean TTFT over that of {first}, the best other"
    return [reporting.Aim(name, ratio, f"<= {1 + TIE}", ratio <= 1 + TIE)]
