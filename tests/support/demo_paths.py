"""Where the demo model and its adapters lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Demo:
    """Paths of the demo: base model folder, adapter folders by name (in the manifest's order), manifest."""

    root: Path
    model: Path
    adapters: dict[str, Path]
    manifest: dict[str, object]

    def lora_paths(self, *names: str) -> list[str]:
        """``NAME=PATH`` arguments for ``--lora-paths``: all adapters, or the named ones."""
        return [f"{name}={self.adapters[name]}" for name in (names or tuple(self.adapters))]
