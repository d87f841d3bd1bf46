"""Runs the tests of ``interpreted/`` in a process whose Triton interprets kernels on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
#: Cases of all ops, twice; fewer were lost.
LEAST = 80


def test_kernels_in_the_interpreter() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--timeout", "600", str(FOLDER)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-5000:]
    passed = re.search(r"(\d+) passed", found.stdout)
    assert passed is not None and int(passed[1]) >= LEAST, found.stdout[-500:]
    assert "skipped" not in found.stdout


@pytest.mark.parametrize("script", ["kernel_bench", "loop_bench"])
def test_gpu_scripts_run_dry(script: str, tmp_path: Path) -> None:
    """What measures on a GPU runs here on tiny sizes, and says that its times mean nothing."""
    out = tmp_path / "out.json"
    found = subprocess.run(
        [sys.executable, "-m", f"elora_sglang.eval.gpu.{script}", "--dry-run", "--json", str(out)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert "a dry run: these times mean nothing" in found.stdout
    result = json.loads(out.read_text())
    assert result["dry_run"] is True and result["aims"] == []
    if script == "loop_bench":
        assert all(result["burst"]["elora"][name] > 0 for name in ("adapter_loads", "demotions"))
    else:
        assert all(one["error_against_reference"] < 0.02 for one in result["lora"])
