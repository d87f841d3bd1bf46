"""The host tier of one rank: host slots, the copies between them and the device, and what those cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from elora_sglang.core.costs import Costs
from elora_sglang.runtime.pool.host import HostPool
from elora_sglang.runtime.transfers.engine import TransferEngine
from elora_sglang.runtime.transfers.link import LOAD, SAVE, Link


@dataclass
class HostTier:
    """Host pool and transfers of one rank.

    Attributes:
        host: the host slots.
        engine: copies between them and the device pool.
        link: the emulated link; ``None`` when copies take what they take.
        costs: what things cost, as measured at start-up; rank 0's on every rank.
    """

    host: HostPool
    engine: TransferEngine
    link: Link | None
    costs: Costs

    def wait_until(self, layer: int) -> None:
        """SGLang's KV pool and the LoRA backend call this before they read ``layer``."""
        self.engine.wait_layer(layer)

    def bandwidths(self) -> tuple[float | None, float | None]:
        """Bytes per second to the device and from it, as measured; ``None`` where nothing was copied yet."""
        return self.engine.bandwidth(LOAD) or None, self.engine.bandwidth(SAVE) or None

    def state(self) -> dict[str, Any]:
        """Bytes moved and bandwidths, for ``/server_info``."""
        return {**self.engine.counters(), "link_gbps": self.engine.link.gbps}
