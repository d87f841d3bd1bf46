"""How much host memory the second tier gets: ``--elora-host-memory``."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

#: Share of the memory that is available at start-up which ``auto`` takes at most.
AUTO_SHARE = 0.5

#: Share of the available memory that an explicit size may take; the rest keeps the machine alive.
HARD_SHARE = 0.95

_SPELLING = re.compile(r"(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<unit>x|gb|g)?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class HostMemory:
    """A parsed ``--elora-host-memory``. At most one of the two is set; none: ``auto``.

    Attributes:
        bytes_total: bytes of the whole server, over all its ranks.
        device_ratio: multiple of each rank's device pool.
    """

    bytes_total: int | None = None
    device_ratio: float | None = None

    @property
    def off(self) -> bool:
        return self.bytes_total == 0 or self.device_ratio == 0


def parse(text: str) -> HostMemory:
    """``auto``, ``0``, ``4``, ``4GB`` or ``0.5x``. Raises ValueError with one line."""
    if text.strip().lower() == "auto":
        return HostMemory()
    found = _SPELLING.fullmatch(text.strip())
    if found is None:
        raise ValueError(
            f"--elora-host-memory: {text!r} is not auto, a number of gigabytes (4 or 4GB) or a multiple of the "
            "device pool (0.5x)"
        )
    number = float(found["number"])
    if (found["unit"] or "").lower() == "x":
        return HostMemory(device_ratio=number)
    return HostMemory(bytes_total=round(number * 1e9))


def host_slots(
    text: str,
    *,
    device_slots: int,
    slot_bytes: int,
    page_size: int,
    ranks: int,
    available_bytes: int,
) -> int:
    """Slots of the host pool of one rank: whole pages, 0 when it is off. Pure.

    Every rank must use the same number: take the smallest over the ranks.

    Args:
        text: the flag's value.
        device_slots: slots of the device pool of one rank.
        slot_bytes: bytes of one slot on one rank, over all layers.
        page_size: slots of a page.
        ranks: ranks of this server that share this machine's memory.
        available_bytes: memory of this machine that is available now.

    Raises:
        ValueError: a size that was asked for does not fit into the machine.
    """
    wanted = parse(text)
    if wanted.off:
        return 0
    share = available_bytes // ranks
    if wanted.bytes_total is not None:
        size = wanted.bytes_total // ranks
    elif wanted.device_ratio is not None:
        size = int(wanted.device_ratio * device_slots * slot_bytes)
    else:
        size = min(device_slots * slot_bytes, int(AUTO_SHARE * share))
    if size > HARD_SHARE * share:
        raise ValueError(
            f"--elora-host-memory {text} is {size * ranks / 1e9:.1f} GB, and {available_bytes / 1e9:.1f} GB are "
            "available; give less"
        )
    return size // slot_bytes // page_size * page_size


def available_bytes() -> int:
    """Memory that this process can still get: the machine's, or its container's if that is less."""
    import psutil  # type: ignore[import-untyped]  # comes with sglang

    available = int(psutil.virtual_memory().available)
    groups = Path("/sys/fs/cgroup")
    for limit, used, stat in (
        (groups / "memory.max", groups / "memory.current", groups / "memory.stat"),
        (
            groups / "memory/memory.limit_in_bytes",
            groups / "memory/memory.usage_in_bytes",
            groups / "memory/memory.stat",
        ),
    ):
        try:
            bound = int(limit.read_text())
            rows = dict(line.split() for line in stat.read_text().splitlines())
            # Cached file pages count as used, but go when memory is asked for.
            taken = int(used.read_text()) - int(rows.get("total_inactive_file", rows.get("inactive_file", 0)))
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
        available = min(available, max(bound - taken, 0))
    return available
