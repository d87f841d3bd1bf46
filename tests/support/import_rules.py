"""``python tests/support/import_rules.py``: import-linter over every package. Its exit status is import-linter's.

import-linter follows neither symbolic links nor folders without ``__init__.py``, so by itself it would see neither
``patches/`` nor ``kernels/`` nor ``eval/``. Here it reads a copy of the package in which they are plain folders.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "elora_sglang"

#: How many modules import-linter's own reader finds.
_COUNT = f"import grimp; print(len(grimp.build_graph({PACKAGE!r}, cache_dir=None).modules))"


def copy_with_real_folders(target: Path) -> int:
    """Copy the package and its rules into ``target``; every folder becomes a package. Returns its Python files."""
    keep_out = shutil.ignore_patterns("__pycache__", "*.json", "*.jinja", "*.md")
    shutil.copytree(ROOT / PACKAGE, target / PACKAGE, ignore=keep_out)  # follows symbolic links
    shutil.copy(ROOT / "pyproject.toml", target)
    for folder in [target / PACKAGE, *(target / PACKAGE).rglob("*")]:
        if folder.is_dir() and any(folder.rglob("*.py")):
            (folder / "__init__.py").touch()
    return len(list((target / PACKAGE).rglob("*.py")))


def lint(folder: Path, files: int) -> tuple[int, str]:
    """Run import-linter in ``folder``; its exit status and what it said. Fails, too, if it sees fewer files."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    counted = subprocess.run(
        [sys.executable, "-c", _COUNT],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    if int(counted.stdout) != files:
        return 1, f"import-linter sees {counted.stdout.strip()} modules of {files}"
    return found.returncode, found.stdout + found.stderr


def main() -> int:
    """Check this checkout."""
    with tempfile.TemporaryDirectory(prefix="elora-imports-") as name:
        status, said = lint(Path(name), copy_with_real_folders(Path(name)))
    print(said)
    return status


if __name__ == "__main__":
    sys.exit(main())
