"""Run by ``test_lifecycle_engine.py`` in a process of its own: adapters through ``sglang.Engine``.

Arguments: demo folder, output file. Writes one JSON object with what was seen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from support import live

PROMPT = "Write a short answer about the weather of the town."


def main(demo: Path, out: Path) -> None:
    adapters = demo / "adapters"
    seen: dict[str, Any] = {}
    with live.forked_engine(
        model_path=str(demo / "base"),
        elora=True,
        dtype="float32",
        max_total_tokens=4000,
        max_running_requests=8,
        lora_paths=[f"sql={adapters / 'sql'}"],
    ) as engine:
        from safetensors.torch import load_file

        def answer(name: str) -> Any:
            sampling = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}
            try:
                return engine.generate(PROMPT, sampling, lora_path=name)["output_ids"]
            except ValueError as error:
                return str(error)

        def note(key: str, result: Any) -> None:
            seen[key] = [result.success, result.error_message, answer("x")]

        seen["sql"] = answer("sql")
        seen["never loaded"] = answer("x")
        note("loaded", engine.load_lora_adapter("x", str(adapters / "french")))
        note("replaced", engine.load_lora_adapter("x", str(adapters / "legal")))
        note("broken", engine.load_lora_adapter("x", str(adapters / "absent")))
        note("unloaded", engine.unload_lora_adapter("x"))
        config = json.loads((adapters / "sql" / "adapter_config.json").read_text())
        tensors = load_file(adapters / "sql" / "adapter_model.safetensors")
        note("tensors", engine.load_lora_adapter_from_tensors("x", tensors, config))
    out.write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
