"""``patches/surface.json``: what was found, and how it is read back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elora_sglang.patches.base import FOLDER, Patch, manifest
from elora_sglang.patches.surface.code import Code
from elora_sglang.patches.surface.shape import Shape, describe
from elora_sglang.patches.surface.syntax import without_collection
from elora_sglang.patches.surface.uses import SGLANG, Use, Uses

FILE = FOLDER / "surface.json"

#: Uses for which the parameters matter, the source text, or whether what we do would fail at once without it.
_CALLED = frozenset({"call", "super", "hook", "override", "register", "replace"})
_DEPENDS_ON_SOURCE = frozenset({"hook", "override", "super"})


@dataclasses.dataclass(frozen=True)
class Entry:
    """One SGLang name that we use.

    Args:
        shape: what SGLang has there; only what we rely on.
        how: our uses of it, sorted.
        parts: what of ours needs it: ``elora``, ``cpu``, ``frontend``, ``eval``.
        users: our files.
        calls: shapes of our calls, ``self`` counted: ``(2, key=)``.
        passes_on: whether all of ours that SGLang calls in its place take any further argument.
    """

    shape: Shape
    how: tuple[str, ...]
    parts: tuple[str, ...]
    users: tuple[str, ...]
    calls: tuple[str, ...] = ()
    passes_on: bool = True

    def uses(self, *kinds: str) -> bool:
        return not set(kinds).isdisjoint(self.how)

    @property
    def needed(self) -> bool:
        """Whether its absence is an error at run time: not so for annotations and for what is only asked for."""
        return not set(self.how) <= {"type", "probe"}


@dataclasses.dataclass(frozen=True)
class Surface:
    """All entries by SGLang name, the SGLang version they were read from, and the files they depend on."""

    sglang: str
    entries: dict[str, Entry]
    files: dict[str, str]
    unseen: tuple[str, ...] = ()


@without_collection
def build(code: Code, records: tuple[Patch, ...], version: str) -> Surface:
    """Read our source and SGLang's, and state what we lean on."""
    uses = Uses(code, records).collect()
    entries, missing = {}, []
    theirs = Code({SGLANG: code.roots[SGLANG]})
    for path, use in sorted(uses.found.items()):
        shape = describe(theirs, path)
        if shape is None:
            missing.append(path)
        else:
            entries[path] = _entry(shape, use)
    unseen = (f"{cls}.{name} in {file}" for cls, name, file in sorted(uses.unseen))
    return Surface(version, entries, digests(theirs), (*missing, *unseen))


def _entry(shape: Shape, use: Use) -> Entry:
    kinds = use.kinds - ({"read"} if use.kinds & {"call", "super"} else set())
    kept = dataclasses.replace(
        shape,
        signature=shape.signature if kinds & _CALLED else "",
        sha256=shape.sha256 if kinds & _DEPENDS_ON_SOURCE else "",
        bases=shape.bases if "subclass" in kinds else (),
        abstract=shape.abstract if "subclass" in kinds else (),
    )
    parts = sorted({part for parts in use.users.values() for part in parts})
    return Entry(
        kept,
        tuple(sorted(kinds)),
        tuple(parts),
        tuple(sorted(use.users)),
        tuple(sorted(use.calls)),
        use.passes_on,
    )


def digests(code: Code) -> dict[str, str]:
    """SHA-256 of every SGLang file that was read, by its path below the package."""
    root = code.roots[SGLANG]
    files = sorted({m.path for m in code.modules_read if m.path.suffix == ".py"})
    return {path.relative_to(root).as_posix(): digest(path) for path in files}


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def dumps(surface: Surface) -> str:
    """The file's text. What ``targets.json`` says of a hooked target is not said again."""
    known = manifest()
    entries = {}
    for path, entry in surface.entries.items():
        data = {key: value for key, value in dataclasses.asdict(entry.shape).items() if value}
        if data["defined"] == path or entry.shape.kind not in ("class", "function"):
            del data["defined"]  # which base has a member is SGLang's own affair
        if entry.uses("hook") and path in known and data.get("sha256") == known[path].sha256:
            del data["sha256"]
        for name in ("how", "parts", "users", "calls"):
            if getattr(entry, name):
                data[name] = getattr(entry, name)
        if not entry.passes_on:
            data["passes_on"] = False
        entries[path] = data
    unseen = "".join(f"\n  {json.dumps(line)}," for line in surface.unseen).rstrip(",")
    parts = (
        f' "sglang": {json.dumps(surface.sglang)}',
        f' "entries": {_rows(entries)}',
        f' "unseen": [{unseen}\n ]',
        f' "files": {_rows(surface.files)}',
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rows(data: Mapping[str, object]) -> str:
    """A JSON object with one line for each key, so that differences read well."""
    lines = (f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in data.items())
    return "{\n" + ",\n".join(lines) + "\n }"


def loads(text: str) -> Surface:
    """The surface that :func:`dumps` wrote."""
    data = json.loads(text)
    known = manifest()
    entries = {}
    for path, row in data["entries"].items():
        sha256 = row.get("sha256", known[path].sha256 if "hook" in row["how"] and path in known else "")
        shape = Shape(
            row["kind"],
            row.get("defined", path),
            row.get("signature", ""),
            sha256,
            tuple(row.get("bases", ())),
            tuple(row.get("abstract", ())),
            row.get("type", ""),
        )
        entries[path] = Entry(
            shape,
            how=tuple(row["how"]),
            parts=tuple(row["parts"]),
            users=tuple(row["users"]),
            calls=tuple(row.get("calls", ())),
            passes_on=row.get("passes_on", True),
        )
    return Surface(data["sglang"], entries, data["files"], tuple(data["unseen"]))


def stored() -> Surface:
    """The surface as it is in the repository, or in the installed package."""
    return loads(FILE.read_text())


@without_collection
def against(surface: Surface, code: Code) -> dict[str, Shape | None]:
    """The shape of every entry in another SGLang."""
    return {path: describe(code, path) for path in surface.entries}


def differences(old: Surface, new: Surface) -> list[str]:
    """One line for each entry that is new, gone or another."""
    was, now = (json.loads(dumps(s)) for s in (old, new))
    lines = [
        f"{path}: not in surface.json, used in {', '.join(new.entries[path].users)}"
        for path in now["entries"]
        if path not in was["entries"]
    ]
    lines += [
        f"{path}: in surface.json, not used any more" for path in was["entries"] if path not in now["entries"]
    ]
    for path, row in now["entries"].items():
        before: dict[str, Any] = was["entries"].get(path, row)
        keys = sorted(key for key in {*row, *before} if row.get(key) != before.get(key))
        if keys:
            what = "; ".join(f"{key} {before.get(key)!r} -> {row.get(key)!r}" for key in keys)
            lines.append(f"{path}: {what}")
    lines += [f"unseen: {line}" for line in {*now["unseen"]} ^ {*was["unseen"]}]
    files = sorted(f for f in {*was["files"], *now["files"]} if was["files"].get(f) != now["files"].get(f))
    return lines + [f"{file}: another file than the one that surface.json was read from" for file in files]
