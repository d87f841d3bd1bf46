"""Runs the tests of ``interpreted/`` in a process whose Triton interprets kernels on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

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
