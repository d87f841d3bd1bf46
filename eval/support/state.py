"""Finished cells on disk, so that a long run goes on where it was cut off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class State:
    """Finished cells as JSON files of a folder; :meth:`cell` measures only what is not there yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, *key: object) -> Path:
        """File of a cell."""
        text = "--".join(str(part) for part in key)
        safe = "".join(c if c.isalnum() or c in "-+.@" else "_" for c in text)
        return self.folder / f"{safe[:90]}--{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"

    def has(self, *key: object) -> bool:
        """Whether the cell is finished."""
        return self.path(*key).exists()

    def cell(self, key: Sequence[object], measure: Callable[[], Any]) -> Any:
        """The cell from disk, or measured now and stored when it is complete."""
        path = self.path(*key)
        if path.exists():
            return json.loads(path.read_text())
        found = measure()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(found))
        partial.rename(path)
        return found
