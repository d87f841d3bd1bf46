"""Any table of requests, CSV or JSON Lines, by a map of its columns: ``time=ts,prompt=in,answer=out``.

Needed: ``time`` of arrival, ``prompt`` and ``answer`` in tokens, the prompt with all that came before. May be
given: ``session``, the conversation a request belongs to; ``adapter``, its name, where an empty one is the base
model; ``unit`` of numbers in time: s (the default), ms, us or ns. A time may also be a date with a time of day.

What prompts share is not in such a table. Ours: a prompt of a session holds as many whole pieces of the
session's context as fit, oldest first, and is new after that; sessions share nothing.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from elora_sglang.eval.workloads.file import bad, lines, parse
from elora_sglang.eval.workloads.model import MAX_ID, Piece, Session, Turn, WorkloadError

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
DATE = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(\.\d+)?(Z|[+-]\d\d:?\d\d)?$")
EXAMPLE = "--columns time=ts,prompt=in,answer=out,session=conv,adapter=model,unit=ms"


@dataclass(frozen=True)
class Columns:
    """Which column of a file is what; ``unit``: see ``UNITS``."""

    time: str
    prompt: str
    answer: str
    session: str | None = None
    adapter: str | None = None
    unit: str = "s"

    @classmethod
    def parse(cls, text: str) -> Columns:
        """The map written as ``time=ts,prompt=in,...``; raises :class:`WorkloadError` if it is not one."""
        known = [field.name for field in fields(cls)]
        pairs = dict(part.partition("=")[::2] for part in text.split(","))
        wrong = [name for name, value in pairs.items() if name not in known or not value]
        missing = [name for name in ("time", "prompt", "answer") if name not in pairs]
        if wrong or missing or pairs.get("unit", "s") not in UNITS:
            what = (
                f"{wrong[0]!r} is no part" if wrong else f"{', '.join(missing) or 'a known unit'} is missing"
            )
            raise WorkloadError(f"columns {text!r}: {what}; write for example {EXAMPLE}")
        return cls(**pairs)


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and values by column; a CSV's first line names its columns. A row is one line.

    Raises :class:`WorkloadError` on a line that is neither.
    """
    names: list[str] | None = None
    delimiter = ","
    for line, text in lines(path):
        if names is None and text.startswith("{"):
            yield from ((n, parse(path, n, t)) for n, t in lines(path))
            return
        if names is None:
            delimiter = max(",;\t", key=text.count)
        values = next(csv.reader([text], delimiter=delimiter))
        if names is None:
            names = [value.strip() for value in values]
            continue
        if len(values) != len(names):
            raise bad(path, line, f"{len(values)} values for {len(names)} columns", "is the file cut off?")
        yield line, dict(zip(names, values, strict=True))


def seconds(value: Any, unit: str, path: Path, line: int) -> float:
    """A time in seconds: a number in ``unit`` (s, ms, us, ns), or a date with a time of day, UTC unless it says."""
    text = str(value).strip()
    try:
        number = float(text) * UNITS[unit]
    except ValueError:
        if not (found := DATE.match(text)):
            advice = "write a number, or a date like 2023-11-16 18:15:46.68"
            raise bad(path, line, f"{text!r} is no time", advice) from None
        try:
            moment = datetime.fromisoformat(f"{found[1]} {found[2]}")
        except ValueError as error:
            raise bad(path, line, f"{text!r} is no time ({error})", "correct the line") from None
        zone = found[4] or "Z"
        hours, minutes = (int(zone[1:3]), int(zone[-2:])) if zone != "Z" else (0, 0)
        ahead = (60 * hours + minutes) * (-60 if zone[0] == "-" else 60)
        number = (moment - datetime(1970, 1, 1)) / timedelta(seconds=1) - ahead + float(found[3] or 0)
    if not abs(number) < float("inf"):
        raise bad(path, line, f"{text!r} is no time", "correct the line")
    return number


def count(value: Any, name: str, path: Path, line: int, least: int) -> int:
    """A number of tokens; raises :class:`WorkloadError` if it is none or below ``least``."""
    try:
        number = float(value)
        if not least <= number < MAX_ID or number != int(number):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        advice = f"a whole number of at least {least} is needed: correct or remove the line"
        raise bad(path, line, f"{name} is {value!r}", advice) from None
    return int(number)


def sessions(path: Path, columns: Columns) -> Iterator[tuple[Session, str | None]]:
    """The sessions in order of their first arrival with their adapters' names; holds the table in memory.

    ``at`` in seconds after the first request. An answer of 0 tokens counts as 1: its prompt was computed. Raises
    :class:`WorkloadError` on the first bad line, and where a session has two adapters.
    """
    grouped: dict[object, list[tuple[float, int, int]]] = {}
    adapters: dict[object, str | None] = {}
    for line, row in rows(path):

        def value(column: str, line: int = line, row: dict[str, Any] = row) -> Any:
            if column not in row:
                raise bad(path, line, f"no column {column!r}", f"the file has {', '.join(row)}")
            return row[column]

        at = seconds(value(columns.time), columns.unit, path, line)
        prompt = count(value(columns.prompt), columns.prompt, path, line, 1)
        answer = max(1, count(value(columns.answer), columns.answer, path, line, 0))
        key = value(columns.session) if columns.session else line
        key = line if key in ("", None) else str(key)
        named = value(columns.adapter) if columns.adapter else None
        adapter = None if named in ("", None) else str(named)
        if adapters.setdefault(key, adapter) != adapter:
            what = f"session {key} changes its adapter from {adapters[key]} to {adapter}"
            raise bad(path, line, what, "a session has one: map no session, or split it")
        grouped.setdefault(key, []).append((at, prompt, answer))
    for members in grouped.values():
        members.sort(key=lambda member: member[0])
    ordered = sorted(grouped.items(), key=lambda item: item[1][0][0])
    first = ordered[0][1][0][0] if ordered else 0.0
    ids = iter(range(MAX_ID))
    for number, (key, members) in enumerate(ordered):
        turns: list[Turn] = []
        context: tuple[Piece, ...] = ()
        for at, prompt, answer in members:
            keep = length = 0
            while keep < len(context) and length + context[keep].tokens <= prompt:
                length += context[keep].tokens
                keep += 1
            new = (Piece(next(ids), prompt - length),) if prompt > length else ()
            turns.append(Turn(keep, new, Piece(next(ids), answer), at=round(at - first, 6)))
            context = (*context[:keep], *new, turns[-1].answer)
        yield Session(str(number), None, tuple(turns)), adapters[key]
