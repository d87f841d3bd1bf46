"""``python -m elora_sglang.patches.surface``: write, check or compare what we lean on in SGLang.

``--write`` reads our source and the installed SGLang and writes ``patches/surface.json``. ``--check`` compares the
file with both and prints one line a difference. ``--diff OLD NEW`` prints what a release changes for us; OLD and NEW
are versions (downloaded by pip), wheels or folders. Exit status 1: the file is not current, or something breaks.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from elora_sglang.patches.base import Patch, discover
from elora_sglang.patches.surface import place, record
from elora_sglang.patches.surface.changes import Comparison, compare
from elora_sglang.patches.surface.code import Code
from elora_sglang.patches.surface.uses import SGLANG


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m elora_sglang.patches.surface", description=__doc__)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="read both sides and write surface.json")
    mode.add_argument("--check", action="store_true", help="is surface.json current?")
    mode.add_argument("--diff", nargs=2, metavar=("OLD", "NEW"), help="what changes for us from OLD to NEW")
    mode.add_argument("--count", action="store_true", help="how much we lean on, by kind")
    parser.add_argument(
        "--sglang", metavar="PLACE", help="folder, wheel or version instead of the installed one"
    )
    parser.add_argument("--json", action="store_true", help="with --diff: one JSON object")
    chosen = parser.parse_args(arguments)
    try:
        return _run(chosen)
    except place.NotFound as error:
        print(f"elora: {error}", file=sys.stderr)
        return 2


def _run(chosen: argparse.Namespace) -> int:
    if chosen.diff:
        with place.opened(chosen.diff[0]) as old, place.opened(chosen.diff[1]) as new:
            return _diff(old, new, as_json=chosen.json)
    if chosen.count:
        print(count(record.stored()))
        return 0
    if chosen.sglang is None:
        return _write_or_check(place.installed(), chosen.write)
    with place.opened(chosen.sglang) as folder:
        return _write_or_check(folder, chosen.write)


def all_records() -> tuple[Patch, ...]:
    """The product's records and those of eval's baselines, which a release may break as well."""
    # By its name: nothing here depends on eval, and a wheel without it would still have a surface.
    baselines: tuple[Patch, ...] = importlib.import_module("elora_sglang.eval.baselines.patches").PATCHES
    return (*discover(), *baselines)


def _write_or_check(sglang: Path, write: bool) -> int:
    built = record.build(place.code_of(sglang), all_records(), place.version_in(sglang))
    if write:
        record.FILE.write_text(record.dumps(built))
        print(count(built))
        for line in built.unseen:
            print(f"not seen in SGLang's source: {line}")
        return 0
    stale = record.differences(record.stored(), built)
    for line in stale:
        print(line, file=sys.stderr)
    if stale:
        print(
            "surface.json is not current; run python -m elora_sglang.patches.surface --write", file=sys.stderr
        )
    return 1 if stale else 0


def count(surface: record.Surface) -> str:
    """How much we lean on: entries by kind, and what is done with them."""
    kinds = ("module", "class", "function", "value", "method", "property", "attribute")
    lines = [f"SGLang {surface.sglang}: {len(surface.entries)} names in {len(surface.files)} files"]
    for title, wanted in (("product", {"elora", "cpu", "frontend"}), ("eval alone", {"eval"})):
        entries = [
            e
            for e in surface.entries.values()
            if (wanted & {*e.parts}) and (title == "product" or set(e.parts) == {"eval"})
        ]
        of_kind = {kind: sum(_kind(e) == kind for e in entries) for kind in kinds}
        lines.append(
            f"{title}: {len(entries)} names; " + ", ".join(f"{n} {kind}" for kind, n in of_kind.items())
        )
        how = {
            use: sum(use in e.how for e in entries)
            for use in ("subclass", "replace", "override", "hook", "register", "super", "write")
        }
        lines.append(f"{title}: " + ", ".join(f"{n} {use}" for use, n in how.items()))
    return "\n".join(lines)


def _kind(entry: record.Entry) -> str:
    return "method" if entry.shape.kind in ("staticmethod", "classmethod") else entry.shape.kind


def _diff(old: Path, new: Path, *, as_json: bool) -> int:
    entries = record.stored().entries
    shapes = record.against(record.stored(), Code({SGLANG: old}))
    found = compare(entries, _as_relied_on(entries, shapes), Code({SGLANG: new}))
    print(as_data(found) if as_json else render(found, place.version_in(old), place.version_in(new)))
    return 1 if found.breaking else 0


def _as_relied_on(entries: dict[str, record.Entry], shapes: dict[str, Any]) -> dict[str, Any]:
    """The old shapes, without what we do not rely on: what the stored shape leaves empty."""
    relied = {}
    for path, shape in shapes.items():
        stored = dataclasses.asdict(entries[path].shape)
        empty = {k: type(v)() for k, v in stored.items() if not v and k not in ("kind", "defined", "type")}
        relied[path] = None if shape is None else dataclasses.replace(shape, **empty)
    return relied


def render(found: Comparison, old: str, new: str) -> str:
    """The comparison for people."""
    lines = [f"SGLang {old} -> {new}"]
    for verdict in ("breaks", "look at"):
        chosen = [change for change in found.changes if change.verdict.value == verdict]
        lines += ["", f"{verdict}:"] if chosen else []
        for change in chosen:
            lines.append(f"  {change.name}: {change.what}" + (f": {change.detail}" if change.detail else ""))
            lines.append(f"      {', '.join(change.users)} [{', '.join(change.parts)}]")
    return "\n".join([*lines, "", found.summary])


def as_data(found: Comparison) -> str:
    """The comparison as one JSON object."""
    changes = [{**dataclasses.asdict(c), "verdict": c.verdict.value} for c in found.changes]
    data = {
        "breaks": len(found.breaking),
        "unchanged": found.unchanged,
        "changes": changes,
        "absent": found.absent,
    }
    return json.dumps(data, indent=1)


if __name__ == "__main__":
    sys.exit(main())
