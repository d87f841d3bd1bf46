"""ELORA's prefix cache and SGLang's own, built without a model and driven through SGLang's own calls.

Every system gets the same keys, slot tensors and calls, the ones its scheduler makes: ``match_prefix``,
``lock``, ``path_device_indices``, ``insert``, ``unlock``, ``evict``. Nothing here imports SGLang before a
system is built.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

SYSTEMS = ("elora", "sglang radix", "sglang unified python", "sglang unified rust")


class CountingAllocator:
    """Stands in for SGLang's slot allocator: counts the slots that come back and in how many pieces."""

    device = "cpu"
    size = 0  # unknown: slots are counted here, not given

    def __init__(self) -> None:
        self.freed = 0
        self.pieces = 0

    def free_segment(self, slots: Any, start_pos: int = 0) -> None:
        """Count the slots. SGLang's caches free their victims one by one; ours frees those of a call at once."""
        self.freed += len(slots)
        self.pieces += 1

    free = free_segment


def _params(page_size: int, **more: Any) -> Any:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    return CacheInitParams(
        disable=False,
        req_to_token_pool=None,
        token_to_kv_pool_allocator=CountingAllocator(),
        page_size=page_size,
        **more,
    )


class _Cache:
    """A prefix cache of SGLang's contract.

    Attributes:
        cache: SGLang's object, or ours in its place.
    """

    cache: Any

    def __init__(self) -> None:
        from sglang.srt.mem_cache import base_prefix_cache as contract
        from sglang.srt.mem_cache.radix_cache import RadixKey

        self._contract, self._key = contract, RadixKey
        self._requests: dict[str, Any] = {}

    def match(self, adapter: str, tokens: array[int]) -> tuple[int, Any]:
        """(matched tokens, node)."""
        key, req = self._key(tokens, extra_key=adapter), self._requests.get(adapter)
        got = self.cache.match_prefix(self._contract.MatchPrefixParams(key=key, req=req))
        return got.device_prefix_len, got.last_device_node

    def evict(self, slots: int) -> int:
        """Free at least ``slots``; returns how many were freed."""
        freed: int = self.cache.evict(self._contract.EvictParams(num_tokens=slots)).num_tokens_evicted
        return freed

    @property
    def victims(self) -> int:
        """Nodes that were evicted so far."""
        return int(self.cache.token_to_kv_pool_allocator.pieces)


class StockCache(_Cache):
    """One of SGLang's prefix caches; adapters are namespaces (``extra_key``), as in stock SGLang."""

    def __init__(self, name: str, page_size: int) -> None:
        super().__init__()
        if name == "sglang radix":
            from sglang.srt.mem_cache.radix_cache import RadixCache

            self.cache = RadixCache(_params(page_size))
        else:
            from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
            from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

            core = name.rsplit(" ", 1)[1]
            params = _params(page_size, tree_components=(ComponentType.FULL,), tree_core_backend=core)
            self.cache = UnifiedRadixCache(params)
            built = type(self.cache.tree_core).__name__
            if built.startswith("Rust") != (core == "rust"):
                raise RuntimeError(f"SGLang built {built} instead of its {core} core")

    def register(self, adapter: str) -> None:
        """Stock SGLang's tree does not know adapters."""

    def insert(self, adapter: str, tokens: array[int], slots: Any) -> Any:
        """Insert the whole key; returns the node at its end."""
        key = self._key(tokens, extra_key=adapter)
        return self.cache.insert(self._contract.InsertParams(key=key, value=slots)).last_device_node


class EloraCache(_Cache):
    """``EloraRadixCache``; only ``insert``, which it does within ``checkpoint``, is called on its tree."""

    def __init__(self, page_size: int) -> None:
        import torch

        from elora_sglang.eval.support.lora_pool import StandInPool
        from elora_sglang.integration.cache import wiring

        super().__init__()
        # Adapters of 64 slots and no bytes: what the weights cost is not the tree's business.
        self._weights = StandInPool({})
        self.cache = wiring.build(_params(page_size), weights=self._weights)
        self._adapter_slots = torch.arange(64)

    @property
    def victims(self) -> int:
        """Nodes that were evicted so far."""
        stats = self.cache.stats
        return int(stats.kv_evictions + stats.adapter_evictions)

    def register(self, adapter: str) -> None:
        """Make the adapter resident."""
        self._requests[adapter] = SimpleNamespace(lora_id=adapter)
        self._weights.sizes[adapter] = len(self._adapter_slots)
        self.cache.tree.make_resident(self.cache.adapters.node(adapter), self._adapter_slots)

    def insert(self, adapter: str, tokens: array[int], slots: Any) -> Any:
        """Insert the whole key; returns the node at its end."""
        node = self.cache.adapters.node(adapter)
        return self.cache.tree.insert(node, tokens, (adapter, None), slots, len(tokens)).node


def build(name: str, page_size: int) -> StockCache | EloraCache:
    """A fresh, empty system by its name in ``SYSTEMS``; raises what SGLang raises if it cannot be built."""
    return EloraCache(page_size) if name == "elora" else StockCache(name, page_size)
