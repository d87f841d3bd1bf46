"""Command-line arguments that name a workload, for every command that plays one."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from elora_sglang.eval.workloads import GENERATORS, create, generator, transforms
from elora_sglang.eval.workloads.columns import EXAMPLE
from elora_sglang.eval.workloads.model import Workload, WorkloadError
from elora_sglang.eval.workloads.traces import open_trace

# Flag -> parameter, of generators and traces alike.
_BOTH = {"rate": "rate", "duration": "duration_s", "adapters": "adapters", "skew": "skew", "drift": "drift_s"}
_BOTH |= {"redraw": "redraw", "ranks": "ranks", "seed": "seed"}
_TRACE = {"speed": "speed", "sample": "sample", "columns": "columns", "preamble": "preamble_tokens"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what :func:`workload` needs, but for the name of a generator, which the command adds as ``args.workload``."""
    add = parser.add_argument_group(
        "workload", "defaults: of the generator, or 100 adapters for a trace"
    ).add_argument
    add("--trace", metavar="FILE", help="play this trace, or saved workload, not a generator")
    add("--rate", type=float, metavar="TURNS", help="turns a second on average")
    add("--duration", type=float, metavar="SECONDS", help="sessions begin within this time")
    add("--adapters", type=int, metavar="N", help="with a trace, 0: those that the file names")
    add("--skew", type=float, metavar="S", help="Zipf exponent of their use, 0 to 1.2 (default 0.9)")
    add("--drift", type=float, metavar="SECONDS", help="re-draw ranks of use so often, 0: never")
    add("--redraw", type=float, metavar="SHARE", help="how many of them (default 0.1)")
    add("--ranks", metavar="LIST", help="LoRA ranks: 32,64 in turn, or 8:0.5,64:0.5 by shares")
    add("--seed", type=int, metavar="N", help="of all that is drawn (default 0)")
    since = "begin so late, with the sessions that are under way then"
    add("--since", type=float, metavar="SECONDS", help=since)
    add("--part", choices=("tuning", "held-out"), help="only these sessions")
    add("--part-share", type=float, default=0.5, metavar="SHARE", help="of tuning sessions (default 0.5)")
    other = "another parameter of the generator; may be repeated"
    add("--set", action="append", default=[], metavar="NAME=VALUE", help=other)
    add = parser.add_argument_group("traces only").add_argument
    add("--speed", type=float, metavar="X", help="divide arrival times by X")
    add("--sample", type=float, metavar="SHARE", help="only this share of the sessions")
    add("--columns", metavar="MAP", help=f"what a table's columns are: {EXAMPLE.split()[1]}")
    add("--preamble", type=int, metavar="TOKENS", help="shared by an adapter's sessions")


def about_generators() -> str:
    """One line per generator, for a command's help."""
    return "\n".join(f"  {name:12} {kind.ABOUT}" for name, kind in GENERATORS.items())


def workload(args: argparse.Namespace) -> Workload:
    """The workload that the arguments name; raises :class:`WorkloadError` if they do not, or contradict."""
    given = {name: getattr(args, flag) for flag, name in _BOTH.items() if getattr(args, flag) is not None}
    only = {name: getattr(args, flag) for flag, name in _TRACE.items() if getattr(args, flag) is not None}
    if (args.workload is None) == (args.trace is None):
        raise WorkloadError(
            f"give the name of a workload ({', '.join(GENERATORS)}) or --trace FILE, and not both"
        )
    if args.trace is not None:
        if args.set:
            raise WorkloadError("--set is for generators; leave it out with --trace")
        found = open_trace(args.trace, **given, **only)
    else:
        if only:
            flags = ", ".join(f"--{flag}" for flag, name in _TRACE.items() if name in only)
            raise WorkloadError(f"{flags}: for traces only; leave it out, or give --trace FILE")
        found = create(args.workload, **given, **_assigned(args.workload, args.set))
    if args.since is not None:
        found = transforms.since(found, args.since)
    if args.part is not None:
        tuning, held_out = transforms.split(found, args.part_share, given.get("seed", 0))
        found = tuning if args.part == "tuning" else held_out
    return found


def _assigned(name: str, assignments: list[str]) -> dict[str, Any]:
    """NAME=VALUE as the generator's parameters, with the type of their defaults; :func:`create` knows the names."""
    defaults = {field.name: field.default for field in fields(generator(name))}
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        kind: Any = type(defaults.get(key, ""))
        try:
            values[key] = kind(text)
        except ValueError:
            equals = ""
        if not equals:
            raise WorkloadError(
                f"--set {assignment}: write NAME=VALUE, the value like {defaults.get(key, 1)!r}"
            )
    return values
