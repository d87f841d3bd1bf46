"""What all measuring commands share: a table for people, ``--json`` for machines, ``--strict`` for gates."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from elora_sglang.eval.provenance import provenance


@dataclass(frozen=True)
class Aim:
    """One thing a command is to show: what was measured, what it should be, and whether it is."""

    name: str
    value: float
    aim: float | str
    ok: bool


@dataclass(frozen=True)
class Table:
    """A title, and what :func:`table` shows below it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` and ``--strict``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if an aim is missed")


def progress(text: str) -> None:
    """Tell a waiting person how far it is; on stderr, so that ``--json`` stays one object."""
    print(text, file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as their widest cell, the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in (lines[0], "-" * len(lines[0]), *lines[1:]))


def finish(
    args: argparse.Namespace,
    *,
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    aims: Sequence[Aim],
    data: Mapping[str, Any],
    more: Sequence[Table] = (),
) -> int:
    """Print the result as ``args`` ask and return the exit status: 1 if ``--strict`` and an aim is missed.

    ``more``: tables below the first one. ``data`` must be JSON-serialisable, is merged beside ``run`` (where the
    result comes from) and ``aims``, and must not use these keys.
    """
    if args.json:
        if {"aims", "run"} & set(data):
            raise ValueError('data must not bring its own "aims" or "run"')
        print(json.dumps({"run": provenance(), "aims": [asdict(aim) for aim in aims], **data}))
    else:
        for one in (Table(title, header, rows), *more):
            print(f"{one.title}\n\n{table(one.header, one.rows)}\n")
        for aim in aims:
            print(f"{'ok    ' if aim.ok else 'MISSED'}  {aim.name}: {aim.value:.4g} (aim: {aim.aim})")
    return int(args.strict and not all(aim.ok for aim in aims))
