"""What moving and computing costs on this machine: the one table that all decisions about seconds use."""

from __future__ import annotations

import dataclasses
import json
import math


@dataclasses.dataclass(frozen=True)
class Costs:
    """Measured at start-up, refined while serving; the same on every rank because it comes with an event.

    Attributes:
        slot_bytes: bytes of one slot, all layers, K and V row.
        load_bytes_s: host to device, bytes per second.
        save_bytes_s: device to host, bytes per second.
        disk_bytes_s: adapter file to host memory, bytes per second.
        latency_s: fixed seconds of one copy.
        prefill_token_s: seconds to prefill one token, without what its context costs.
        prefill_token2_s: seconds more per token and token of context before it.

    Raises:
        ValueError: a figure is not finite, a size or bandwidth is not positive, or a time is negative.
    """

    slot_bytes: int
    load_bytes_s: float
    save_bytes_s: float
    disk_bytes_s: float
    latency_s: float
    prefill_token_s: float
    prefill_token2_s: float

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0.0 if field.name in ("latency_s", "prefill_token2_s") else math.ulp(0.0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"cost {field.name} must be a finite number, got {value!r}")
            if value < least:
                raise ValueError(
                    f"cost {field.name} must be {'positive' if least else 'at least 0'}, got {value!r}"
                )

    def load_s(self, slots: int) -> float:
        """Seconds to copy ``slots`` from the host to the device."""
        return self.latency_s + slots * self.slot_bytes / self.load_bytes_s

    def save_s(self, slots: int) -> float:
        """Seconds to copy ``slots`` from the device to the host."""
        return self.latency_s + slots * self.slot_bytes / self.save_bytes_s

    def disk_s(self, slots: int) -> float:
        """Seconds to read an adapter of ``slots`` from its file to the host."""
        return self.latency_s + slots * self.slot_bytes / self.disk_bytes_s

    def recompute_s(self, start: int, tokens: int) -> float:
        """Seconds to prefill ``tokens`` that follow ``start`` tokens of context."""
        pairs = tokens * start + tokens * (tokens - 1) / 2
        return tokens * self.prefill_token_s + pairs * self.prefill_token2_s

    @classmethod
    def default(cls) -> Costs:
        """Before anything is measured: an 8B model on one data-centre GPU behind PCIe 5 (nominal figures)."""
        return cls(128 * 1024, 50e9, 50e9, 3e9, 20e-6, 32e-6, 1e-9)

    def to_json(self) -> str:
        """One line of JSON; :meth:`from_json` gives an equal object back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Costs:
        """The costs :meth:`to_json` wrote. Raises ``ValueError`` for any other text."""
        values = json.loads(text)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"costs need exactly the fields {', '.join(sorted(names))}")
        return cls(**values)
