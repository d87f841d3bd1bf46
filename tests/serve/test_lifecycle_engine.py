"""Adapter operations through ``sglang.Engine(elora=True)``: the same rules, tensors passed as file handles."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from support import live
from support.demo_paths import Demo


def test_engine_operations(demo: Demo, tmp_path: Path) -> None:
    script, out = live.ROOT / "tests" / "support" / "lifecycle_engine.py", tmp_path / "seen.json"
    status, log = live.run(
        [sys.executable, str(script), str(demo.root), str(out)],
        log=tmp_path / "engine.log",
        timeout=600,
        env=live.clean_env(PYTHONPATH=str(Path(__file__).parents[1])),
    )
    assert status == 0, log[-4000:]
    seen = json.loads(out.read_text())
    assert "Unknown adapter 'x'; nearest loaded: sql" in seen["never loaded"]
    french, legal = seen["loaded"], seen["replaced"]
    assert french[:2] == legal[:2] == [True, ""]
    assert isinstance(french[2], list) and isinstance(legal[2], list) and french[2] != legal[2]
    assert not seen["broken"][0] and "no such folder" in seen["broken"][1] and seen["broken"][2] == legal[2]
    assert seen["unloaded"][0] and "Unknown adapter 'x'" in seen["unloaded"][2]
    assert seen["tensors"] == [True, "", seen["sql"]]
