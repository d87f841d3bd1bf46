"""A GPU's proportions, and the link that gives another machine the same ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "profiles"
DEFAULT = "h200-llama-8b"


@dataclass(frozen=True)
class Profile:
    """What one GPU and one model cost: bytes of a token's KV, seconds to prefill a token, link in GB/s each way."""

    name: str
    derived_from: str
    kv_bytes_per_token: int
    prefill_s_per_token: float
    link_gbps: float
    adapter_rank: int
    adapter_bytes: int

    @property
    def link_to_compute(self) -> float:
        """Seconds to move one token's KV over seconds to prefill one token."""
        return self.kv_bytes_per_token / (self.link_gbps * 1e9) / self.prefill_s_per_token

    def link_for(self, kv_bytes_per_token: int, prefill_s_per_token: float) -> float:
        """GB/s at which a machine that prefills a token in so many seconds has this profile's link-to-compute ratio.

        Raises ValueError for a cost that is not above 0.
        """
        if kv_bytes_per_token <= 0 or prefill_s_per_token <= 0:
            raise ValueError(
                f"costs must be above 0, got {kv_bytes_per_token} bytes and {prefill_s_per_token} s a token"
            )
        return kv_bytes_per_token / (self.link_to_compute * prefill_s_per_token) / 1e9


def load(name: str = DEFAULT) -> Profile:
    """A profile of ``eval/profiles`` by name, or of a file by path. Raises OSError, TypeError or ValueError."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    return Profile(**json.loads(path.read_text()))
