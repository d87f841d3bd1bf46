"""The check before a server starts, and for ``doctor``: is this the SGLang that our code was written against?

Every SGLang file that the surface depends on has its SHA-256 in ``surface.json``. When all are as they were there is
nothing to compare, and the check costs a few milliseconds. Else the entries are compared, which takes seconds.
"""

from __future__ import annotations

import functools
from pathlib import Path

from elora_sglang.patches.surface import place, record
from elora_sglang.patches.surface.changes import Change, Comparison, compare
from elora_sglang.patches.surface.code import Code
from elora_sglang.patches.surface.uses import SGLANG


def changes(sglang: Path) -> Comparison:
    """What an SGLang package folder has otherwise than ``surface.json``. Imports nothing of it."""
    surface = record.stored()
    if all(_same(sglang / name, digest) for name, digest in surface.files.items()):
        return Comparison((), len(surface.entries))
    shapes = {path: entry.shape for path, entry in surface.entries.items()}
    return compare(surface.entries, shapes, Code({SGLANG: sglang}))


def _same(path: Path, digest: str) -> bool:
    return path.is_file() and record.digest(path) == digest


@functools.cache
def faults(part: str = "elora") -> tuple[Change, ...]:
    """What the installed SGLang has otherwise, as far as a part of ours needs it; worst first, looked at once.

    ``part``: ``elora``, ``cpu``, ``frontend`` or ``eval``. Raises place.NotFound without an SGLang.
    """
    return tuple(change for change in changes(place.installed()).changes if part in change.parts)
