"""Who is asked when a pool is audited. No one of them is believed alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from elora_sglang.core.tree.tree import DependencyTree
from elora_sglang.runtime.lora_pool import LoRAPool
from elora_sglang.runtime.pool.host import HostPool


@dataclass(frozen=True)
class Witnesses:
    """What an audit reads. It changes none of them.

    Attributes:
        tree: who holds which slots, as the tree says.
        allocator: SGLang's allocator of device slots: which are free.
        rows: SGLang's ``ReqToTokenPool``: the slots of running requests, ``req_to_token[row, position]``.
        weights: the LoRA pool: where adapters lie, and their bytes.
        host: the host slots; ``None`` without a host tier.
        arriving: transfers to the device that are in flight, kept up to date by their owner.
        page_size: slots per page.
    """

    tree: DependencyTree
    allocator: Any
    rows: Any
    weights: LoRAPool
    host: HostPool | None
    arriving: Collection[int]
    page_size: int

    @property
    def device_rows(self) -> int:
        """Rows of the device pool, the dummy page included."""
        return int(self.allocator.size) + self.page_size
