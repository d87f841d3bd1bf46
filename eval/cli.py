"""``python -m elora_sglang.eval COMMAND``: a command is a module here with ``register(subparsers)``."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """Ends on a mistake in one line with the command's name, as the commands do themselves."""

    def error(self, message: str) -> NoReturn:
        """See :class:`argparse.ArgumentParser`."""
        raise SystemExit(f"{self.prog.rpartition(' ')[2]}: {message}")


def build_parser() -> argparse.ArgumentParser:
    """The parser with one subcommand per module that defines ``register``; each sets ``run(args) -> int``."""
    parser = OneLineParser(prog="python -m elora_sglang.eval", description="Measure ELORA.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for found in sorted(pkgutil.iter_modules([str(Path(__file__).parent)]), key=lambda module: module.name):
        if found.name in ("__main__", "cli"):
            continue
        module = importlib.import_module(f"elora_sglang.eval.{found.name}")
        if hasattr(module, "register"):
            module.register(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    args = build_parser().parse_args(argv)
    status: int = args.run(args)
    return status
