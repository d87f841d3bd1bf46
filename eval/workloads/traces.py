"""Opens a trace of any known format, or a saved workload, and gives adapters to its sessions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from elora_sglang.eval.workloads import azure, columns, file, mooncake, taskmaster, transforms
from elora_sglang.eval.workloads.columns import Columns
from elora_sglang.eval.workloads.model import Adapter, Header, Piece, Session, Workload, WorkloadError
from elora_sglang.eval.workloads.popularity import Popularity, lora_adapters

# No reader uses ids near it.
PREAMBLE_ID = -(1 << 62)
DEFAULTS: dict[str, Any] = {"adapters": 100, "skew": 0.9, "drift_s": 600.0, "redraw": 0.1, "ranks": "32,64"}

Found = Iterator[tuple[Session, str | None]]


def detect(path: Path) -> str:
    """``saved``, ``mooncake``, ``taskmaster``, ``azure`` or ``unknown``, by the first line of the file."""
    number, text = next(file.lines(path), (0, ""))
    if not text:
        raise WorkloadError(f"{path}: empty; is this the right file?")
    if text.startswith("{"):
        row = file.parse(path, number, text)
        if row.get("format") == file.FORMAT:
            return "saved"
        if "hash_ids" in row:
            return "mooncake"
        return "taskmaster" if "turns" in row else "unknown"
    return "azure" if set(azure.COLUMNS) <= {name.strip() for name in text.split(",")} else "unknown"


def _source(
    path: Path, mapped: Columns | None, rate: float | None, duration_s: float | None, seed: int
) -> tuple[str, Callable[[], Found]]:
    """The format of a file, and its sessions."""
    kind = "columns" if mapped else detect(path)
    if kind == "taskmaster":
        pace = 4.0 if rate is None else rate
        return kind, lambda: taskmaster.sessions(path, pace, duration_s, seed)
    if rate is not None or duration_s is not None:
        raise WorkloadError(
            f"{path}: its requests have their times; leave rate and duration out, change the speed"
        )
    if mapped:
        return kind, lambda: columns.sessions(path, mapped)
    if kind in (known := {"mooncake": mooncake.sessions, "azure": azure.sessions}):
        return kind, lambda: known[kind](path)
    names = ", ".join(next((row for _, row in columns.rows(path)), {"none": ""}))
    raise WorkloadError(f"{path}: an unknown format; name its columns ({names}) with {columns.EXAMPLE}")


def open_trace(
    path: str | Path,
    *,
    columns: str | Columns | None = None,
    adapters: int | None = None,
    skew: float | None = None,
    drift_s: float | None = None,
    redraw: float | None = None,
    ranks: str | None = None,
    seed: int = 0,
    speed: float = 1.0,
    sample: float = 1.0,
    preamble_tokens: int | None = None,
    rate: float | None = None,
    duration_s: float | None = None,
) -> Workload:
    """The sessions of a file; its format is told by its first line, or it is a table with the named ``columns``.

    ``adapters``: how many, given to sessions by :class:`.popularity.Popularity`; 0 takes those that the file names (the
    verticals of Taskmaster's dialogs, a column), or the base model where it names none; the default is 0 where
    ``columns`` names an adapter, else 100. ``speed``: arrival times are divided by it. ``sample``: share of sessions,
    by ``seed``; who is left keeps its time and adapter. ``preamble_tokens``: what all sessions of an adapter begin
    with. ``rate`` (turns a second, default 4) and ``duration_s``: for dialogs, which have no times. A saved workload
    has its adapters and takes only speed and sample.

    Raises :class:`WorkloadError` here if the file cannot be read or told, and on iterating at its first bad line.
    """
    path = Path(path)
    mapped = Columns.parse(columns) if isinstance(columns, str) else columns
    transforms.check_speed(speed)
    given = {"adapters": adapters, "skew": skew, "drift_s": drift_s, "redraw": redraw, "ranks": ranks}
    given = {name: value for name, value in given.items() if value is not None}
    if not mapped and detect(path) == "saved":
        others = {"preamble_tokens": preamble_tokens, "rate": rate, "duration_s": duration_s}
        extra = [*given, *(name for name, value in others.items() if value is not None)]
        if extra:
            raise WorkloadError(f"{path}: a saved workload is played as it is; leave {extra[0]} out")
        saved = file.read(path)
        saved = transforms.faster(saved, speed) if speed != 1 else saved
        return transforms.sample(saved, sample, seed) if sample != 1 else saved

    kind, source = _source(path, mapped, rate, duration_s, seed)
    settings = DEFAULTS | ({"adapters": 0} if mapped and mapped.adapter else {}) | given
    named: dict[
        str, int
    ] = {}  # index by name of the adapters that the file names, which is read once for them
    if settings["adapters"] == 0:
        named = {name: index for index, name in enumerate(sorted({name for _, name in source() if name}))}
    listed = lora_adapters(len(named) or settings["adapters"], settings["ranks"], seed)
    if named:
        listed = tuple(Adapter(name, a.rank) for name, a in zip(named, listed, strict=True))
    popularity = None
    if settings["adapters"]:
        drawn = {name: settings[name] for name in ("skew", "drift_s", "redraw")}
        popularity = Popularity(settings["adapters"], seed=seed, **drawn)
    preamble = preamble_tokens or 0
    if preamble < 0:
        raise WorkloadError(f"a preamble has at least 0 tokens, got {preamble}")

    def sessions() -> Iterator[Session]:
        for number, (found, name) in enumerate(source()):
            session = transforms.sped(found, speed)
            adapter = popularity.adapter(number, session.start) if popularity else named.get(name or "")
            session = replace(session, adapter=adapter)
            yield _begun(session, preamble) if preamble else session

    about: dict[str, Any] = {"trace": path.name, "format": kind, "speed": speed, **settings}
    about |= {"preamble_tokens": preamble, "rate": rate, "duration_s": duration_s}
    header = Header(path.name.partition(".")[0], seed, about, listed)
    workload = Workload(header, sessions)
    return transforms.sample(workload, sample, seed) if sample != 1 else workload


def _begun(session: Session, preamble_tokens: int) -> Session:
    """The session with its adapter's preamble before its first prompt, and kept from then on."""
    shared = Piece(PREAMBLE_ID + (-1 if session.adapter is None else session.adapter), preamble_tokens)
    first, *others = session.turns
    kept = (replace(turn, keep=turn.keep + 1) for turn in others)
    return replace(session, turns=(replace(first, new=(shared, *first.new)), *kept))
