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


class Store:
    """The host side of :class:`Weights`: a read from an adapter's file has ended when it is asked for next."""

    def __init__(self, adapters: list[str]) -> None:
        self._new, self._ended = adapters, list[tuple[str, None]]()

    def bind(self, host: Any) -> None:
        """No bytes, nowhere to put them."""

    def in_memory(self) -> list[str]:
        """Adapters that SGLang loaded at start-up and nobody has placed yet."""
        new, self._new = self._new, []
        return new

    def drop_cpu_tensors(self, lora_id: str) -> None:
        """There are none."""

    def read_into_host(self, lora_id: str, slots: Any) -> None:
        """Nothing to write."""

    def start_read(self, key: str, slots: Any) -> None:
        """Nothing to read: it has ended."""
        self._ended.append((key, None))

    def poll_reads(self, *, wait: bool = False) -> list[tuple[str, None]]:
        """Reads that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def drop_host(self, lora_id: str) -> None:
        """Nothing to forget."""

    drop_all = bind


class Weights:
    """What the cache asks of ``EloraLoRAMemoryPool``, for adapters of ``sizes`` slots without bytes."""

    on_cuda = False
    layer_fence: Any = None

    def __init__(self, sizes: dict[str, int]) -> None:
        self._sizes = sizes
        self.store = Store(list(sizes))
        self.manager = SimpleNamespace(loras=dict.fromkeys(sizes))
        self.loads = 0

    def slots_needed(self, lora_id: str) -> int:
        """Slots of the adapter."""
        return self._sizes[lora_id]

    def is_loaded(self, lora_id: str) -> bool:
        """Whether it is one of ours."""
        return lora_id in self._sizes

    def is_pinned(self, lora_id: str) -> bool:
        """None is."""
        return False

    def load(self, lora_id: str, slots: Any) -> None:
        """An adapter is read from its file; counted."""
        self.loads += 1

    def adopt(self, lora_id: str, slots: Any) -> None:
        """An adapter came from the host."""

    drop = adopt


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
    from elora_sglang.integration.cache.host_tier import HostTier
    from elora_sglang.integration.cache.radix_cache import EloraRadixCache
    from elora_sglang.integration.plugin.config import EloraConfig
    from elora_sglang.runtime.pool.host import HostPool
    from elora_sglang.runtime.pool.views import UnifiedPool
    from elora_sglang.runtime.ticks import TickSource
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
    weights: Any = Weights(adapters)
    cache = EloraRadixCache(
        params,
        weights=weights,
        settings=EloraConfig(enabled=True, policy=policy),
        tier=HostTier(on_host, engine, link, costs),
    )
    # How long a read of nothing took says nothing about a disk.
    cache.driver.meter = None
    cache.ticks = TickSource(cache.driver.finished, cache._new_costs, shared=False, clock=clock)
    return Serverless(cache, params.token_to_kv_pool_allocator, params.req_to_token_pool, clock)
