"""``python -m elora_sglang.eval overhead``: what does ``--elora`` cost when nothing is short?

Stock SGLang LoRA and ``--elora`` serve the same live workload on the same machine, platform plugin and
pool, in interleaved pairs whose order alternates; the idle server is stopped (SIGSTOP) meanwhile, because
SGLang's scheduler spins. Each pair has prompts of its own, so neither side profits from an earlier pair.
Reported are the ratios elora ÷ stock of mean TTFT and mean TPOT with a 95 % interval over pairs
(Student's t on the logarithms).
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from elora_sglang.eval import server
from elora_sglang.eval.serving import player
from elora_sglang.eval.serving.launch import adapters_for_stock
from elora_sglang.eval.support import arguments, estimates, reporting
from elora_sglang.eval.workloads.model import Piece, Session, Turn

ANSWER_TOKENS = 16


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    parser = subparsers.add_parser("overhead", help="--elora against stock, nothing short, live, in pairs")
    add, count = parser.add_argument, arguments.count
    add("--demo", type=Path, default=Path(".demo"), help="folder of the demo (default %(default)s)")
    add("--pairs", type=count, default=12, help="interleaved pairs, at least 2 (default %(default)s)")
    add("--sessions", type=count, default=12, help="sessions a run (default %(default)s)")
    add("--turns", type=count, default=3, help="turns a session (default %(default)s)")
    add("--adapters", type=count, default=8, help="adapters in use (default %(default)s)")
    add("--rate", type=arguments.positive, default=3.0, help="requests a second (default %(default)s)")
    add("--seed", type=int, default=1)
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)


def lanes(rng: random.Random, *, adapters: int, sessions: int, turns: int, rate: float) -> player.Lanes:
    """One run's sessions: Poisson arrivals in turn, each turn extends its session's last prompt by fixed content."""
    ids = itertools.count(rng.getrandbits(60))
    found: list[list[Turn]] = [[] for _ in range(sessions)]
    at = 0.0
    for number in range(turns):
        for turn in found:
            at += rng.expovariate(rate)
            length = rng.randrange(20, 60) if number else rng.randrange(60, 180)
            # Kept are the earlier pieces of the prompt, not the answer.
            turn.append(Turn(number, (Piece(next(ids), length),), Piece(0, ANSWER_TOKENS), at=at))
    return [[Session(str(number), number % adapters, tuple(turn))] for number, turn in enumerate(found)]


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    if args.pairs < 2:
        raise SystemExit("overhead: --pairs must be at least 2, an interval needs two ratios")
    manifest = json.loads((args.demo / "manifest.json").read_text())
    paths = {entry["name"]: args.demo / entry["path"] for entry in manifest["adapters"]}
    names = list(paths)[: args.adapters]
    model = args.demo / manifest["model"]
    vocab = json.loads((model / "config.json").read_text())["vocab_size"]
    common = [
        "--enable-lora",
        "--max-running-requests",
        "16",
        "--max-total-tokens",
        "40000",
        "--dtype",
        "float32",
    ]
    seconds: dict[str, list[tuple[float, float]]] = {"stock": [], "elora": []}
    differing = compared = 0
    with TemporaryDirectory() as folder, ExitStack() as stack:
        slots = ("--lora-backend", "torch_native", "--max-loras-per-batch", str(len(paths) + 1))
        launched = {"stock": (slots, adapters_for_stock(paths, Path(folder))), "elora": (("--elora",), paths)}
        servers = {}
        for name, (flags, adapters) in launched.items():
            lora = ("--lora-paths", *(f"{adapter}={path}" for adapter, path in adapters.items()))
            servers[name] = stack.enter_context(
                server.server(model, *common, *flags, *lora, log_dir=Path(folder), name=name)
            )
            servers[name].pause()
        for pair in range(-1, args.pairs):  # pair -1 warms both servers up and is dropped
            work = lanes(
                random.Random(f"{args.seed}/{pair}"),
                adapters=len(names), sessions=args.sessions, turns=args.turns, rate=args.rate,
            )  # fmt: skip
            outputs = {}
            for name in sorted(servers, reverse=pair % 2 == 0):
                with servers[name].awake():
                    answers = player.serve(servers[name].url, work, names, vocab=vocab).answers
                outputs[name] = {one.key: one.output_ids for one in answers}
                if pair >= 0:
                    ttft = statistics.fmean(one.ttft for one in answers)
                    seconds[name].append((ttft, statistics.fmean(one.tpot for one in answers)))
            stock = outputs["stock"]
            differing += sum(ids != stock[key] for key, ids in outputs["elora"].items())
            compared += len(stock)
            reporting.progress(f"pair {pair + 1} of {args.pairs}")
    rows: list[list[object]] = []
    aims = []
    for label, stock_s, elora_s in zip(
        ("TTFT", "TPOT"),
        zip(*seconds["stock"], strict=True),
        zip(*seconds["elora"], strict=True),
        strict=True,
    ):
        ratio = estimates.paired_ratio(elora_s, stock_s)
        means = (f"{1000 * statistics.fmean(each):.1f}" for each in (stock_s, elora_s))
        rows.append([label, *means, f"{ratio.mean:.3f}", f"{ratio.low:.3f} to {ratio.high:.3f}"])
        aims.append(reporting.Aim.at_most(f"{label} ratio, upper end of the 95 % interval", ratio.high, 1.05))
    aims.append(reporting.Aim("answers that differ from stock", differing, 0, differing == 0))
    title = (
        f"--elora against stock, nothing short: {args.pairs} pairs of {args.sessions * args.turns} requests, "
        f"{compared} answers compared"
    )
    table = reporting.Table(title, ["", "stock ms", "elora ms", "ratio", "95 % interval"], rows, "overhead")
    data = {"seed": args.seed, "pairs": args.pairs, "seconds": seconds}
    return reporting.finish(args, [table], aims, data | {"compared": compared, "differing": differing})
