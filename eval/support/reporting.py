"""What all measuring commands share: tables for people, ``--json`` for machines, ``--strict`` for gates."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tabulate

from elora_sglang.eval.support.provenance import provenance

tabulate.MIN_PADDING = 0  # columns are as wide as their widest cell


@dataclass(frozen=True)
class Aim:
    """One thing a command is to show: what was measured, what it should be, and whether it is."""

    name: str
    value: float
    aim: float | str
    ok: bool

    @classmethod
    def at_most(cls, name: str, value: float, limit: float) -> Aim:
        """Met by a value up to ``limit``."""
        return cls(name, value, f"<= {limit:g}", value <= limit)

    @classmethod
    def at_least(cls, name: str, value: float, limit: float) -> Aim:
        """Met by a value from ``limit`` on."""
        return cls(name, value, f">= {limit:g}", value >= limit)


@dataclass(frozen=True)
class Table:
    """A result in rows. ``name``: what it is, for programs: ``report`` draws the figures of this name beside it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    name: str = ""

    def text(self) -> str:
        """Title and rows: the first column to the left, the others to the right."""
        align = ["left", *("right" for _ in self.header[1:])]
        shown = tabulate.tabulate(
            [*self.rows], [*self.header], "simple", colalign=align, disable_numparse=True
        )
        return f"{self.title}\n\n{shown}\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--json`` and ``--strict``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if an aim is missed")


def progress(text: str) -> None:
    """Tell a waiting person how far it is; on stderr, so that ``--json`` stays one object."""
    print(text, file=sys.stderr, flush=True)


def as_json(
    tables: Sequence[Table],
    aims: Sequence[Aim],
    data: Mapping[str, Any],
    about: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """The form of all results: ``data`` beside ``run`` (where it comes from, with ``about``), ``aims`` and ``tables``.

    Raises ValueError where ``data`` brings one of these itself.
    """
    result = {
        "run": provenance() | dict(about or {}),
        "aims": [asdict(aim) for aim in aims],
        "tables": [asdict(table) for table in tables],
    }
    if wrong := sorted(set(result) & set(data)):
        raise ValueError(f'data must not bring its own "{wrong[0]}"')
    return result | dict(data)


def show(tables: Sequence[Table], aims: Sequence[Aim]) -> None:
    """Print tables and aims for people."""
    for table in tables:
        print(table.text())
    for aim in aims:
        print(f"{'ok    ' if aim.ok else 'MISSED'}  {aim.name}: {aim.value:.4g} (aim: {aim.aim})")


def finish(
    args: argparse.Namespace, tables: Sequence[Table], aims: Sequence[Aim], data: Mapping[str, Any]
) -> int:
    """Print the result as ``args`` ask and return the exit status: 1 if ``--strict`` and an aim is missed.

    ``data`` must be JSON-serialisable; see :func:`as_json`.
    """
    if args.json:
        print(json.dumps(as_json(tables, aims, data)))
    else:
        show(tables, aims)
    return int(args.strict and not all(aim.ok for aim in aims))
