"""``python -m elora_sglang.eval report RUN…``: results as one self-contained page and PNG figures.

A RUN is what a command of ``eval`` wrote with ``--json`` (``simulate``: with ``--series`` for pictures over time). The
page has every table and figure inside; the figures lie beside it as files, too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from elora_sglang.eval.support import reporting


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand to ``python -m elora_sglang.eval``."""
    parser = subparsers.add_parser("report", help="results as one HTML page and PNG figures")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="JSON of a run")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder (default %(default)s)")
    parser.add_argument("--title", default="elora-sglang: measured and simulated")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read, draw, write; returns the exit status. What cannot be read ends it with one line."""
    try:
        from elora_sglang.eval.pages import page
    except ModuleNotFoundError as error:
        raise SystemExit(f"report: {error.name} is missing; pip install 'elora-sglang[eval]'") from None
    runs = [(path, _read(path)) for path in args.runs if not path.name.endswith(".reasons.json")]
    written = page.write(args.out, args.title, [page.section(path, data) for path, data in runs])
    reporting.progress(f"wrote {written} and {len(list(args.out.glob('*.png')))} figures beside it")
    return 0


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SystemExit(f"report: {path}: {error}") from None
    if not isinstance(data, dict) or not ({"sizes", "capacities", "tables"} & set(data)):
        raise SystemExit(f"report: {path}: not the JSON of a command of eval; write it with --json")
    return data
