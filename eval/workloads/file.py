"""A workload as a file: JSON Lines, the header first, then one session a line; ``.gz`` by its name.

Keys are sorted and numbers are written as Python writes them, so that equal workloads are equal files, line by line.
Reading and writing hold one session in memory.

``{"adapters": [["NAME", RANK], ...], "format": "elora-workload", "name": ..., "parameters": {...}, "seed": ...,
"version": 1}`` and ``{"adapter": INDEX or null, "id": ..., "turns": [{"answer": [ID, TOKENS], "at" or "think":
SECONDS, "keep": PIECES, "new": [[ID, TOKENS], ...]}, ...]}``.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, cast

from elora_sglang.eval.workloads import model
from elora_sglang.eval.workloads.model import Adapter, Header, Piece, Session, Turn, Workload, WorkloadError

FORMAT = "elora-workload"


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of every line that is not blank, without its end.

    Raises :class:`WorkloadError` if the file cannot be read as UTF-8 text, or as gzip where the name says so.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as raw:
            file = io.TextIOWrapper(cast(BinaryIO, raw), encoding="utf-8-sig")
            for number, line in enumerate(file, 1):
                if text := line.strip():
                    yield number, text
    except UnicodeDecodeError:
        raise bad(path, number + 1, "not UTF-8 text", "is this the right file?") from None
    except FileNotFoundError:
        raise WorkloadError(f"{path}: no such file; check the path") from None
    except (OSError, EOFError, zlib.error) as error:
        raise WorkloadError(f"{path}: cannot be read ({error}); check the file") from None


def bad(path: Path, line: int, what: str, advice: str) -> WorkloadError:
    """The error for a line of a file, to be raised."""
    return WorkloadError(f"{path}:{line}: {what}; {advice}")


def parse(path: Path, line: int, text: str) -> dict[str, Any]:
    """The JSON object on a line; raises :class:`WorkloadError` if there is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        what = f"not JSON ({error.msg} at column {error.colno})"
        raise bad(path, line, what, "is the file cut off?") from None
    if not isinstance(value, dict):
        raise bad(path, line, "not a JSON object", "is this the right file?")
    return value


def _whole(value: Any, what: str) -> int:
    if type(value) is not int:
        raise ValueError(what)
    return value


def _piece(value: Any) -> Piece:
    number, count = value
    what = "a piece is two whole numbers"
    return Piece(_whole(number, what), _whole(count, what))


def _seconds(value: Any) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"{value!r} is not a number of seconds")
    return value


def _turn(value: dict[str, Any]) -> Turn:
    new, keep = tuple(map(_piece, value["new"])), _whole(value["keep"], "keep is a whole number")
    return Turn(keep, new, _piece(value["answer"]), _seconds(value.get("think")), _seconds(value.get("at")))


def _session(value: dict[str, Any]) -> Session:
    adapter, name = value["adapter"], value["id"]
    if not (adapter is None or type(adapter) is int) or not isinstance(name, str):
        raise ValueError("id is a text, adapter an index or null")
    return Session(name, adapter, tuple(_turn(turn) for turn in value["turns"]))


def _header(path: Path, number: int, text: str) -> Header:
    value = parse(path, number, text)
    advice = "write it again with `python -m elora_sglang.eval workload ... --out FILE`"
    if value.get("format") != FORMAT:
        raise bad(path, number, "not the header of a saved workload", advice)
    if value.get("version") != model.VERSION:
        raise bad(path, number, f"version {value.get('version')}, this program reads {model.VERSION}", advice)
    try:
        adapters = tuple(Adapter(str(name), int(rank)) for name, rank in value["adapters"])
        return Header(str(value["name"]), int(value["seed"]), dict(value["parameters"]), adapters)
    except (KeyError, TypeError, ValueError) as error:
        raise bad(path, number, f"a broken header ({_reason(error)})", advice) from None


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _sessions(path: Path, header: Header) -> Iterator[Session]:
    last = 0.0
    rows = lines(path)
    next(rows)
    for number, text in rows:
        try:
            session = _session(parse(path, number, text))
        except WorkloadError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            what = f"not a session ({_reason(error)})"
            raise bad(path, number, what, "is the file cut off or edited?") from None
        if wrong := model.fault(session, len(header.adapters)):
            raise bad(path, number, wrong, "repair the line or write the file again")
        if session.start < last:
            what = f"first arrival {session.start} s, before {last} s"
            raise bad(path, number, what, "sort the sessions by it")
        last = session.start
        yield session


def read(path: str | Path) -> Workload:
    """The workload in a file; its sessions are read anew, and checked, each time they are iterated.

    Raises :class:`WorkloadError` if the header is not one.
    """
    path = Path(path)
    first = next(lines(path), None)
    if first is None:
        raise WorkloadError(f"{path}: empty; is this the right file?")
    header = _header(path, *first)
    return Workload(header, lambda: _sessions(path, header))


def _dump(**value: object) -> str:
    return (
        json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"
    )


def header_line(header: Header) -> str:
    """The first line of the file."""
    adapters = [[adapter.name, adapter.rank] for adapter in header.adapters]
    return _dump(**{**asdict(header), "adapters": adapters, "format": FORMAT})


def session_line(session: Session) -> str:
    """The line of one session."""
    turns = []
    for turn in session.turns:
        when = {"at": turn.at} if turn.at is not None else {"think": turn.think}
        new = [[piece.id, piece.tokens] for piece in turn.new]
        turns.append({"answer": [turn.answer.id, turn.answer.tokens], "keep": turn.keep, "new": new, **when})
    return _dump(adapter=session.adapter, id=session.id, turns=turns)


def write(workload: Workload, path: str | Path) -> None:
    """Write a workload; a file of that name is replaced once all of it is written, and is left alone on an error."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as raw:
            # No name and no time in the gzip header: equal workloads are equal files.
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
            with io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as file:
                file.write(header_line(workload.header))
                for session in workload.sessions():
                    file.write(session_line(session))
        os.replace(part, path)
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be written ({error.strerror}); check folder and space") from None
    finally:
        part.unlink(missing_ok=True)
