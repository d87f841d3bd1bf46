"""What stock SGLang needs to be compared fairly: the same weights, said in words that it understands."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path


def adapters_for_stock(adapters: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """The adapters by name, rsLoRA ones replaced by copies below ``folder`` with the same scaling.

    SGLang 0.5.23 ignores ``use_rslora`` and scales by ``alpha / r`` (``lora/lora.py``) instead of
    ``alpha / sqrt(r)``; a copy with ``alpha * sqrt(r)`` and without the flag means the same to everybody.

    Raises:
        ValueError: the scaled alpha is not a whole number, so that the copy would not be exact.
    """
    found: dict[str, Path] = {}
    for name, path in adapters.items():
        config = json.loads((path / "adapter_config.json").read_text())
        found[name] = path
        if not config.get("use_rslora"):
            continue
        alpha = config["lora_alpha"] * math.sqrt(config["r"])
        if alpha != round(alpha):
            raise ValueError(
                f"{path}: alpha {config['lora_alpha']} cannot be rescaled exactly for rank {config['r']}"
            )
        found[name] = folder / name
        shutil.copytree(path, found[name])
        config.update(lora_alpha=round(alpha), use_rslora=False)
        (found[name] / "adapter_config.json").write_text(json.dumps(config))
    return found
