"""``python -m elora_sglang.eval overhead``: what does ``--elora`` cost when nothing is short?

Stock SGLang LoRA and ``--elora`` serve the same live workload on the same machine, platform plugin and
pool, in interleaved pairs whose order alternates; the idle server is stopped (SIGSTOP) meanwhile, because
SGLang's scheduler spins. Each pair has prompts of its own, so neither side profits from an earlier pair.
Reported are the ratios elora ÷ stock of mean TTFT and mean TPOT with a 95 % interval over pairs
(Student's t on the logarithms).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from elora_sglang.eval import client, server
from elora_sglang.eval.fair import adapters_for_stock
from elora_sglang.eval.support import reporting


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    parser = subparsers.add_parser("overhead", help="--elora against stock, nothing short, live, in pairs")
    parser.add_argument("--demo", type=Path, default=Path(".demo"), help="folder of the demo (default .demo)")
    parser.add_argument("--pairs", type=int, default=12, help="interleaved pairs (default 12)")
    parser.add_argument("--sessions", type=int, default=12, help="sessions a run (default 12)")
    parser.add_argument("--turns", type=int, default=3, help="turns a session (default 3)")
    parser.add_argument("--adapters", type=int, default=8, help="adapters in use (default 8)")
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second (default 3)")
    parser.add_argument("--seed", type=int, default=1)
    reporting.add_arguments(parser)
    parser.set_defaults(run=run)


def make_jobs(
    rng: random.Random, adapters: Sequence[str], *, sessions: int, turns: int, rate: float, vocab: int
) -> list[client.Job]:
    """One run's requests in order of sending: Poisson arrivals, turns of a session extend its prompt."""
    prompts = [[rng.randrange(5, vocab) for _ in range(rng.randrange(60, 180))] for _ in range(sessions)]
    jobs, at = [], 0.0
    for _turn in range(turns):
        for session, prompt in enumerate(prompts):
            at += rng.expovariate(rate)
            jobs.append(client.Job(tuple(prompt), adapters[session % len(adapters)], 16, at))
            prompt.extend(rng.randrange(5, vocab) for _ in range(rng.randrange(20, 60)))
    return jobs


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of paired ratios and its 95 % Student interval: (mean, low, high)."""
    from scipy.stats import t

    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.fmean(logs)
    half = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def _measure(
    live: server.LiveServer, jobs: Sequence[client.Job]
) -> tuple[float, float, list[tuple[int, ...]]]:
    os.killpg(live.process.pid, signal.SIGCONT)
    try:
        answers = asyncio.run(client.run_open_loop(live.url, jobs))
    finally:
        os.killpg(live.process.pid, signal.SIGSTOP)
    ttft = statistics.fmean(answer.ttft for answer in answers)
    tpot = statistics.fmean(answer.tpot for answer in answers)
    return ttft, tpot, [answer.output_ids for answer in answers]


def _lora(paths: Mapping[str, Path]) -> list[str]:
    return ["--lora-paths", *(f"{name}={path}" for name, path in paths.items())]


def run(args: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    if args.pairs < 2:
        raise SystemExit("overhead: --pairs must be at least 2, an interval needs two ratios")
    manifest = json.loads((args.demo / "manifest.json").read_text())
    paths = {entry["name"]: args.demo / entry["path"] for entry in manifest["adapters"]}
    names = list(paths)[: args.adapters]
    vocab = json.loads((args.demo / manifest["model"] / "config.json").read_text())["vocab_size"]
    common = [
        "--enable-lora",
        "--max-running-requests",
        "16",
        "--max-total-tokens",
        "40000",
        "--dtype",
        "float32",
    ]
    seen: dict[str, list[tuple[float, float]]] = {"stock": [], "elora": []}
    differing = compared = 0
    with TemporaryDirectory() as folder, ExitStack() as stack:
        stock = adapters_for_stock(paths, Path(folder))
        flags = {
            "stock": [
                *("--lora-backend", "torch_native", "--max-loras-per-batch", str(len(paths) + 1)),
                *_lora(stock),
            ],
            "elora": ["--elora", *_lora(paths)],
        }
        servers = {}
        for name, extra in flags.items():
            servers[name] = stack.enter_context(
                server.server(args.demo / manifest["model"], *common, *extra, log_dir=Path(folder), name=name)
            )
            os.killpg(servers[name].process.pid, signal.SIGSTOP)
        for pair in range(-1, args.pairs):  # pair -1 warms both servers up and is dropped
            rng = random.Random(f"{args.seed}/{pair}")
            jobs = make_jobs(
                rng, names, sessions=args.sessions, turns=args.turns, rate=args.rate, vocab=vocab
            )
            outputs = {}
            for name in sorted(servers, reverse=pair % 2 == 0):
                ttft, tpot, outputs[name] = _measure(servers[name], jobs)
                if pair >= 0:
                    seen[name].append((ttft, tpot))
            differing += sum(a != b for a, b in zip(outputs["stock"], outputs["elora"], strict=True))
            compared += len(jobs)
            reporting.progress(f"pair {pair + 1} of {args.pairs}")
        for live in servers.values():
            os.killpg(live.process.pid, signal.SIGCONT)
    rows, aims = [], []
    for index, label in enumerate(("TTFT", "TPOT")):
        ratios = [e[index] / s[index] for s, e in zip(seen["stock"], seen["elora"], strict=True)]
        mean, low, high = interval(ratios)
        stock_ms, elora_ms = (
            1000 * statistics.fmean(pair[index] for pair in seen[name]) for name in ("stock", "elora")
        )
        rows.append([label, f"{stock_ms:.1f}", f"{elora_ms:.1f}", f"{mean:.3f}", f"{low:.3f} to {high:.3f}"])
        aims.append(reporting.Aim(f"{label} ratio, upper end of the 95 % interval", high, 1.05, high <= 1.05))
    aims.append(reporting.Aim("answers that differ from stock", differing, 0, differing == 0))
    title = (
        f"--elora against stock, nothing short: {args.pairs} pairs of {args.sessions * args.turns} requests, "
        f"{compared} answers compared"
    )
    table = reporting.Table(title, ["", "stock ms", "elora ms", "ratio", "95 % interval"], rows)
    return reporting.finish(
        args,
        [table],
        aims,
        {
            "seed": args.seed,
            "pairs": args.pairs,
            "seconds": seen,
            "compared": compared,
            "differing": differing,
        },
    )
