"""ELORA's cache with all that is below it, and no server: SGLang's allocator, both slot pools, the copies between them.

Only bytes are missing: a slot has 32 of them, so that moving them does not hide what deciding and booking cost, and
adapters have slots but no weights. Time is :class:`Clock`'s, so that a life takes the same course on every machine.
Nothing here imports SGLang before a cache is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

#: Bytes of a K row and of a V row, in one layer.
ROW_BYTES = 16


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Seconds since the start."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now += seconds


@dataclass
class Serverless:
    """One cache and what is below it."""

    cache: Any
    allocator: Any
    rows: Any
    clock: Clock


def build(
    policy: str, device: int, host: int, adapters: dict[str, int], rows: int, context: int
) -> Serverless:
    """A cache with ``device`` and ``host`` slots, page size 1, all else at its defaults, as ``--elora`` builds it.

    Adapters are known and placed by the first tick. Copies travel over an emulated link that carries as many slots a
    second as 50 GB/s carry of an 8B model's, so that they arrive an iteration later or two.

    Args:
        adapters: slots by id.
        rows: requests that may run at once.
        context: most tokens of one.
    """
    import torch
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    from elora_sglang.core.costs import Costs
    from elora_sglang.eval.support.lora_pool import StandInPool
    from elora_sglang.integration.cache import wiring
    from elora_sglang.integration.plugin.config import EloraConfig
    from elora_sglang.runtime.host_tier import HostTier
    from elora_sglang.runtime.pool.host import HostPool
    from elora_sglang.runtime.pool.views import UnifiedPool
    from elora_sglang.runtime.transfers.engine import TransferEngine
    from elora_sglang.runtime.transfers.link import Link

    torch.set_num_threads(1)
    clock, costs = Clock(), Costs.default()
    k, v = (torch.zeros((device + 1, 1, ROW_BYTES), dtype=torch.uint8) for _ in range(2))
    pool = UnifiedPool([k], [v], page_size=1)
    on_host = HostPool(host, pool, pin=False)
    link = Link(costs.load_bytes_s * 2 * ROW_BYTES / costs.slot_bytes / 1e9)
    engine = TransferEngine(pool, on_host, link, clock=clock, sleep=clock.sleep)
    params: Any = SimpleNamespace(
        req_to_token_pool=ReqToTokenPool(rows, context, "cpu", enable_memory_saver=False),
        token_to_kv_pool_allocator=TokenToKVPoolAllocator(
            device, dtype=torch.uint8, device="cpu", kvcache=None, need_sort=False
        ),
        page_size=1,
        is_eagle=False,
        enable_metrics=False,
    )
    cache = wiring.build(
        params,
        weights=StandInPool(adapters),
        settings=EloraConfig(enabled=True, policy=policy),
        tier=HostTier(on_host, engine, link, costs),
        clock=clock,
    )
    # How long a read of nothing took says nothing about a disk.
    cache.driver.meter = None
    return Serverless(cache, params.token_to_kv_pool_allocator, params.req_to_token_pool, clock)
