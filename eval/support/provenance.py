"""Where a result comes from: what must be known to measure it again."""

from __future__ import annotations

import contextlib
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
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str | None:
    """The checkout's commit, with "-dirty" where its files differ; None outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit, changed = (
            git("rev-parse", "--short", "HEAD"),
            git("status", "--porcelain", "--untracked-files=no"),
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit
