"""How eager the swapper is, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

#: Share of the device that adapters get where they do not compete with KV (``static``, or without "unified").
LORA_SHARE = 0.2


@dataclass(frozen=True)
class SwapSettings:
    """How eager the swapper is.

    Attributes:
        host_slots: size of the host pool; 0: no host tier, nothing is ever copied.
        busy_watermark: share of the device in use above which clean leaves are swapped out.
        idle_watermark: share below which host copies are fetched ahead.
        swap_interval_s: seconds between plans that nothing else calls for.
        queue_prefetch, idle_prefetch, backup, guard: the parts, each can be switched off.
        inflight_share: share of the device that loads in flight may take together.
        lora_share: share of the device that adapters get where they do not compete with KV.
        switched_off: names of switched-off parts and terms.

    Raises:
        ValueError: a share outside 0..1, a watermark order that makes no sense, or a negative number.
    """

    host_slots: int = 0
    busy_watermark: float = 0.95
    idle_watermark: float = 0.70
    swap_interval_s: float = 0.1
    queue_prefetch: bool = True
    idle_prefetch: bool = True
    backup: bool = True
    guard: bool = True
    inflight_share: float = 0.25
    lora_share: float = LORA_SHARE
    switched_off: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.idle_watermark <= self.busy_watermark <= 1 or not 0 < self.inflight_share <= 1:
            raise ValueError(
                "watermarks and shares must satisfy 0 <= idle <= busy <= 1 and 0 < inflight <= 1"
            )
        if self.host_slots < 0 or self.swap_interval_s < 0:
            raise ValueError("host_slots and swap_interval_s must be at least 0")


def switches(off: frozenset[str]) -> dict[str, Any]:
    """Arguments of :class:`SwapSettings` where these parts and terms are switched off (``--elora-without``)."""
    on = {name: name.replace("_", "-") not in off for name in ("queue_prefetch", "idle_prefetch")}
    return {**on, "backup": "backup" not in off, "guard": "guard" not in off, "switched_off": off}


@dataclass
class SwapCounts:
    """Counted decisions since start."""

    queue_loads: int = 0
    idle_loads: int = 0
    admission_loads: int = 0
    backups: int = 0
    pressure_saves: int = 0
    swap_outs: int = 0
    reads: int = 0
    demotions: int = 0
    drops: int = 0
    guard_breaks: int = 0
    host_evictions: int = 0
    failed: int = 0

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
