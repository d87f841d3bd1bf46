"""What transfers moved, how fast, and how long batches waited for them."""

from __future__ import annotations

from elora_sglang.runtime.transfers.link import LOAD, SAVE

#: Share that earlier transfers keep in the bandwidth mean when one completes.
KEEP = 0.9


class TransferMeter:
    """Totals since the start, and an exponential mean of the bandwidth over completed transfers, weighted
    by bytes so that tiny copies, which are all overhead, do not set it."""

    def __init__(self) -> None:
        self._moved = {LOAD: 0, SAVE: 0}
        self._count = {LOAD: 0, SAVE: 0}
        self._failures = {LOAD: 0, SAVE: 0}
        self._recent = {LOAD: (0.0, 0.0), SAVE: (0.0, 0.0)}  # bytes, seconds, both decayed
        self._waits = {"layer": (0, 0.0), "forward": (0, 0.0)}

    def completed(self, direction: str, size: int, seconds: float) -> None:
        """One transfer of ``size`` bytes that kept its link busy for ``seconds``."""
        self._count[direction] += 1
        self._moved[direction] += size
        if size and seconds > 0:
            moved, spent = self._recent[direction]
            self._recent[direction] = (moved * KEEP + size, spent * KEEP + seconds)

    def failed(self, direction: str) -> None:
        self._failures[direction] += 1

    def waited(self, kind: str, waits: int, seconds: float) -> None:
        """A batch waited ``waits`` times, ``seconds`` in all, at a "layer" or before a "forward"."""
        count, total = self._waits[kind]
        self._waits[kind] = (count + waits, total + seconds)

    def bandwidth(self, direction: str) -> float:
        """Bytes per second of recent transfers; 0 before the first."""
        moved, seconds = self._recent[direction]
        return moved / seconds if seconds > 0 else 0.0

    def counters(self) -> dict[str, float]:
        """``*_bytes_s``: measured; ``*_waits`` and ``*_wait_s``: times a batch waited, and seconds."""
        return {
            "loads": self._count[LOAD],
            "saves": self._count[SAVE],
            "loaded_bytes": self._moved[LOAD],
            "saved_bytes": self._moved[SAVE],
            "failed_loads": self._failures[LOAD],
            "failed_saves": self._failures[SAVE],
            "load_bytes_s": self.bandwidth(LOAD),
            "save_bytes_s": self.bandwidth(SAVE),
            "layer_waits": self._waits["layer"][0],
            "layer_wait_s": self._waits["layer"][1],
            "forward_waits": self._waits["forward"][0],
            "forward_wait_s": self._waits["forward"][1],
        }
