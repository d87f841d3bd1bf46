"""The file that a server's events and actions are recorded in (``--elora-trace-out``)."""

from __future__ import annotations

from elora_sglang.core.manager import CacheManager
from elora_sglang.core.trace import Recorder


class TraceFile:
    """Written in large pieces, and to the disk every second."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", buffering=1 << 20, encoding="utf-8")  # noqa: SIM115  # open until the end
        self._flushed = 0.0

    def write(self, line: str) -> None:
        """Add one line."""
        self._file.write(line)
        self._file.write("\n")

    def tick(self, now: float) -> None:
        """Time (seconds) went on: a server that is killed loses little of its trace."""
        if now - self._flushed >= 1.0:
            self._flushed = now
            self._file.flush()


def record(manager: CacheManager, path: str, rank: int) -> TraceFile | None:
    """Record the manager's events and actions into ``path`` (ranks after the first: ``path.rankN``), if given."""
    if not path:
        return None
    file = TraceFile(path if rank == 0 else f"{path}.rank{rank}")
    Recorder(manager, file.write)
    return file
