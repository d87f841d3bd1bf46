"""Where a result comes from: what must be known to measure it again."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

PACKAGES = ("elora-sglang", "sglang", "torch", "transformers", "numpy")


def provenance() -> dict[str, object]:
    """Commit, versions, command, hardware and date of this process; what cannot be found out is left out."""
    found: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command(sys.argv),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
    }
    commit = _commit()
    return found if commit is None else {"commit": commit, **found}


def command(argv: list[str]) -> str:
    """The command line without paths of this machine: of the script, and of files named by absolute paths."""
    program = Path(argv[0])
    name = "python -m elora_sglang.eval" if program.name == "__main__.py" else program.name
    return " ".join([name, *(shlex.quote(_without_folder(word)) for word in argv[1:])])


def _without_folder(word: str) -> str:
    flag, equals, value = word.rpartition("=")
    return f"{flag}{equals}{Path(value).name}" if value.startswith(("/", "~")) else word


def hardware() -> str:
    """Processor, cores, memory."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """The checkout's commit, with "-dirty" where its files differ; None outside of one."""
    folder = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(folder)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed.strip() else commit
