"""``python -m elora_sglang.eval explore``: every order of events around copies in flight, to a depth.

The invariants are checked in every state, and that everything can end from there. A broken rule ends the command with
the shortest sequence of events that leads to it.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

from elora_sglang.core.policies import policy_names
from elora_sglang.eval.interleavings.scenes import ANY, SCENES, Scene
from elora_sglang.eval.interleavings.search import Explored, Explorer, record, told
from elora_sglang.eval.support import arguments, reporting


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    parser = subparsers.add_parser(
        "explore", help="every order of events around copies in flight, to a depth"
    )
    add, default = parser.add_argument, "(default %(default)s)"
    known = "; ".join(f"{name}: {what}" for name, (_, what) in SCENES.items())
    add(
        "--scenes",
        type=arguments.names(SCENES),
        default=",".join(SCENES),
        metavar="NAME,...",
        help=f"where to start (default all). {known}",
    )
    add("--depth", type=arguments.count, default=8, help=f"events in a row {default}")
    add("--seconds", type=arguments.positive, default=600.0, help=f"most seconds a scene {default}")
    add(
        "--policies",
        type=arguments.names([*policy_names(), ANY]),
        metavar="NAME,...",
        help=f"explore each scene under these policies; '{ANY}' lets whoever may leave leave (default: the scene's)",
    )
    add("--no-ending", action="store_true", help="do not try, from each state, that everything ends")
    add(
        "--trace-out",
        type=Path,
        metavar="DIR",
        help=f"record a longest path of each scene, for core.trace; not of policy '{ANY}'",
    )
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Explore the scenes; exit status 1 where a rule is broken, with or without ``--strict``."""
    results: dict[str, Explored] = {}
    for name, scene in _scenes(args):
        reporting.progress(f"{name}: up to {args.depth} events, at most {args.seconds:g} s")
        results[name] = seen = Explorer(scene, ending=not args.no_ending).run(args.depth, args.seconds)
        if seen.found is not None:
            reporting.progress(f"{name}: {seen.found.error}\n" + "\n".join(told(seen.found)))
        elif args.trace_out is not None and scene.policy != ANY:
            args.trace_out.mkdir(parents=True, exist_ok=True)
            (args.trace_out / f"{name}.jsonl").write_text(record(scene, seen.longest), encoding="utf-8")
    rows = [
        (
            name,
            f"{seen.states:,}",
            f"{seen.transitions:,}",
            "all" if seen.complete else seen.depth,
            f"{seen.seconds:.0f}",
            "broken" if seen.found else "holds",
        )
        for name, seen in results.items()
    ]
    header = ("scene", "states", "transitions", "depth", "seconds", "I1 to I6")
    table = reporting.Table("Every order of events, up to a depth", header, rows, "explore")
    broken = sum(seen.found is not None for seen in results.values())
    aims = [reporting.Aim.at_most("scenes with a broken rule", broken, 0)]
    aims += [reporting.Aim.at_least(f"depth of {name}", _depth(s), args.depth) for name, s in results.items()]
    data = {"scenes": {name: asdict(seen) for name, seen in results.items()}}
    return reporting.finish(args, [table], aims, data) or int(broken > 0)


def _depth(seen: Explored) -> float:
    return float("inf") if seen.complete else float(seen.depth)


def _scenes(args: argparse.Namespace) -> list[tuple[str, Scene]]:
    chosen = [(name, SCENES[name][0]) for name in args.scenes]
    if args.policies is None:
        return chosen
    return [
        (f"{name}/{policy}", replace(scene, policy=policy))
        for name, scene in chosen
        for policy in args.policies
    ]
