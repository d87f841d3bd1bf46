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
from elora_sglang.eval.sim.future import foresee
from elora_sglang.eval.sim.study import Job, Study, best_of, gap_closed, jobs_of, run_all
from elora_sglang.eval.sim.traffic import HintQuality
from elora_sglang.eval.support import arguments, reporting
from elora_sglang.eval.workloads import GENERATORS, description
from elora_sglang.eval.workloads import arguments as workload_arguments
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
        description=f"Workloads:\n{workload_arguments.about_generators()}\n\nSystems:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workload", metavar="NAME", help=", ".join(GENERATORS))
    workload_arguments.add_arguments(parser)
    add, default, numbers = parser.add_argument, "(default %(default)s)", arguments.numbers
    chosen: dict[str, Any] = {"type": arguments.names(known), "default": DEFAULT_SYSTEMS, "metavar": "LIST"}
    add("--policies", "--systems", dest="systems", help=f"systems and policies, by comma {default}", **chosen)
    machine = f"machine and model: a JSON file, or one of {', '.join(machines.names())}"
    add("--profile", default="h800-llama-8b", metavar="P", help=f"{machine} {default}")
    memory = "device memory in shares of the footprint (default: the profile's)"
    add("--memory", type=numbers, metavar="LIST", help=memory)
    host = "host memory over device memory, inf for endless (default 4, or the profile's)"
    add("--host", type=numbers, metavar="LIST", help=host)
    add("--block-tokens", type=arguments.count, default=64, help=f"tokens of a slot {default}")
    add("--warmup", type=float, default=0.1, metavar="SHARE", help=f"of the time, not counted {default}")
    add("--hint-recall", type=float, default=0.0, help="share of last turns that say so")
    add("--hint-false", type=float, default=0.0, help="share of other turns that say so, too")
    series = "with --json: also what `report` draws over time and as distributions"
    add("--series", action="store_true", help=series)
    add("--jobs", type=int, default=2, help=f"processes {default}")
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run all jobs and print a table for each size of memory; returns the exit status."""
    try:
        workload = workload_arguments.workload(args)
        measured = description.measure(workload, args.block_tokens)
        machine = machines.load(args.profile)
    except (WorkloadError, machines.MachineError) as error:
        raise SystemExit(f"simulate: {error}") from None
    if measured is None:
        raise SystemExit("simulate: no sessions; make the duration, the rate or the share of sessions larger")
    sizes = list(_sizes(args, machine, workload, measured))
    future = foresee(workload, args.block_tokens) if systems.CLAIRVOYANT in args.systems else None
    header = workload.header
    hints = HintQuality(args.hint_recall, args.hint_false, header.seed)
    warmup_s = args.warmup * measured.span_s
    study = Study(workload, machine, args.block_tokens, warmup_s, hints, future, args.series)
    try:
        jobs = [job for size in sizes for name in args.systems for job in jobs_of(study, name, *size)]
    except ValueError as error:
        raise SystemExit(f"simulate: {error}") from None
    found = run_all(study, jobs, args.jobs)
    speed = 60 * len(jobs) * measured.turns / sum(values["wall_s"] for values in found.values())
    reporting.progress(f"{len(jobs)} runs, {speed:,.0f} requests a minute on one core")
    title = f"{header.name} on {machine.name}, {measured.turns:,} turns, blocks of {args.block_tokens}\n\n"
    tables: list[reporting.Table] = []
    data, aims = [], []
    for label, device, host in sizes:
        best = {name: _with_knobs(*best_of(found, name, label)) for name in args.systems}
        least = None if future is None else study.bound(device, host).least
        what = f"{label}: {device:,} device slots, {_slots(host)} host slots"
        tables.append(
            reporting.Table(what if tables else title + what, HEADER, rows(best, least), "simulated")
        )
        size = {"memory": label, "device_slots": device, "host_slots": host, "bound_s": least}
        data.append({**size, "systems": best})
        aims += _aims(label, best)
    return reporting.finish(args, tables, aims, {
        "workload": {"name": header.name, "seed": header.seed, "parameters": dict(header.parameters)},
        "machine": machine.name, "block_tokens": args.block_tokens, "warmup_s": warmup_s,
        "hints": {"recall": hints.recall, "false": hints.false}, "sizes": data, "requests_a_minute": speed,
    })  # fmt: skip


HEADER = (
    "system", "knob", "TTFT ms", "P50", "P95", "P99", "TPOT", "KV dev %", "host %", "LoRA dev %", "host %",
    "GB in", "GB out", "invalid %", "restore s", "gap %", "x bound",
)  # fmt: skip


def _slots(count: int) -> str:
    return "endless" if count >= ENDLESS else f"{count:,}"


def _sizes(
    args: argparse.Namespace, machine: machines.Machine, workload: Workload, measured: description.Description
) -> Iterator[tuple[str, int, int]]:
    """(label, device slots, host slots) of every size asked for."""
    slot = machine.kv_bytes_per_token * args.block_tokens
    ranks = (adapter.rank for adapter in workload.header.adapters)
    adapters = sum(machine.adapter_slots(rank, args.block_tokens) for rank in ranks)
    footprint = measured.distinct_tokens // args.block_tokens + adapters
    default = 4.0 if args.memory else machine.host_bytes / machine.device_bytes
    for share in args.memory or (None,):
        device = int(machine.device_bytes // slot if share is None else share * footprint)
        what = "the profile's memory" if share is None else f"{share:.0%} of the footprint"
        for times in args.host or (default,):
            yield f"{what}, host {times:.3g}x", device, ENDLESS if math.isinf(times) else int(times * device)


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
    times = {name: values["ttft"]["mean"] for name, values in best.items() if name != systems.CLAIRVOYANT}
    ours = times.pop("elora", None)
    if ours is None or not times:
        return []
    first = min(times, key=lambda name: (times[name], name))
    name = f"{label}: elora's mean TTFT over that of {first}, the best other"
    return [reporting.Aim.at_most(name, ours / times[first] if times[first] else 1.0, 1 + TIE)]
