"""White-box harness: the real cache, tree, allocators and request rows, without a model or a server.

Only the adapters are stand-ins: :class:`FakeWeights` writes recognisable bytes into real pool rows, with the
interface that the cache and the auditor use of ``EloraLoRAMemoryPool``.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey

from elora_sglang.integration.radix_cache import EloraRadixCache

ROW_BYTES = 8


@dataclass
class FakeWeights:
    """Adapters as rows of one byte pool; adapter k's rows are filled with the byte k + 1."""

    sizes: dict[str, int]
    pool: torch.Tensor
    pinned: set[str] = field(default_factory=set)
    resident: dict[str, torch.Tensor] = field(default_factory=dict)
    on_cuda: bool = False

    def slots_needed(self, lora_id: str) -> int:
        return self.sizes[lora_id]

    def is_loaded(self, lora_id: str) -> bool:
        return lora_id in self.sizes

    def is_pinned(self, lora_id: str) -> bool:
        return lora_id in self.pinned

    def load(self, lora_id: str, slots: torch.Tensor) -> None:
        assert lora_id not in self.resident
        self.pool[slots] = list(self.sizes).index(lora_id) + 1
        self.resident[lora_id] = slots.sort().values

    def drop(self, lora_id: str, slots: torch.Tensor | None = None) -> None:
        self.resident.pop(lora_id, None)

    def drop_all(self) -> None:
        self.resident.clear()

    def read_bytes(self, lora_id: str) -> torch.Tensor:
        return self.pool[self.resident[lora_id]].flatten()

    def expected_bytes(self, lora_id: str, *, from_files: bool = False) -> torch.Tensor:
        value = list(self.sizes).index(lora_id) + 1
        return torch.full((self.sizes[lora_id] * ROW_BYTES,), value, dtype=torch.uint8)


class Harness:
    """A cache over a pool of ``size`` slots, and requests that go through SGLang's own sequence of calls."""

    def __init__(
        self, size: int, adapters: dict[str, int], *, page_size: int = 1, pinned: set[str] | None = None
    ) -> None:
        make: Any = TokenToKVPoolAllocator if page_size == 1 else PagedTokenToKVPoolAllocator
        arguments: dict[str, Any] = {} if page_size == 1 else {"page_size": page_size}
        self.allocator = make(
            size, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False, **arguments
        )
        self.rows = ReqToTokenPool(1024, 1024, "cpu", enable_memory_saver=False)
        self.page_size = page_size
        self.size = size
        pool = torch.zeros((size + page_size, ROW_BYTES), dtype=torch.uint8)
        self.weights = FakeWeights(adapters, pool, pinned or set())
        params = SimpleNamespace(
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
            is_eagle=False,
            enable_metrics=False,
        )
        self.cache = EloraRadixCache(params, weights=self.weights, audit_interval=1)
        self._next_row = 1

    def request(self, tokens: list[int], lora_id: str | None = None, **extra: Any) -> SimpleNamespace:
        """A request that has not been matched yet. ``extra``: ``extra_key``, ``cache_salt``."""
        key = extra.get("extra_key")
        return SimpleNamespace(
            rid=f"r{self._next_row}",
            lora_id=lora_id,
            extra_key=(key or "") + lora_id if lora_id else key,
            cache_salt=extra.get("cache_salt"),
            origin_input_ids=array("q", tokens),
            output_ids=array("q"),
            full_untruncated_fill_ids=array("q", tokens),
            prefix_len=0,
            last_node=None,
            lock=None,
            kv=SimpleNamespace(
                req_pool_idx=None,
                cache_protected_len=0,
                cache_inserted_len=0,
                kv_allocated_len=0,
                holds_kv=False,
            ),
        )

    def match(self, req: SimpleNamespace) -> int:
        """As ``Req.init_next_round_input``: at most all tokens but the last."""
        ids = req.full_untruncated_fill_ids
        key = RadixKey(ids, req.extra_key, limit=max(0, len(ids) - 1), cache_salt=req.cache_salt)
        result = self.cache.match_prefix(MatchPrefixParams(key=key, req=req))
        req.prefix_len, req.last_node = result.device_prefix_len, result.last_device_node
        req.kv.cache_protected_len = req.prefix_len
        return int(req.prefix_len)

    def admit(self, req: SimpleNamespace) -> None:
        """Match, load the adapter, lock, allocate the rest of the row; raises when it does not fit."""
        self.match(req)
        if not req.last_node.resident:
            assert self.cache.load_adapter(req.last_node), "no room for the adapter"
        req.lock = self.cache.lock(req.last_node)
        req.kv.req_pool_idx, self._next_row = self._next_row, self._next_row + 1
        req.kv.holds_kv = True
        self._extend_row(req, self.cache.prefix_device_indices(req))

    def grow(self, req: SimpleNamespace, tokens: list[int]) -> None:
        """Decode: append tokens and slots for them."""
        req.output_ids.extend(tokens)
        req.full_untruncated_fill_ids.extend(tokens)
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        self._extend_row(req, row[: req.kv.kv_allocated_len].long())

    def _extend_row(self, req: SimpleNamespace, have: torch.Tensor) -> None:
        length, page = len(req.full_untruncated_fill_ids), self.page_size
        need = -(-length // page) * page - -(-len(have) // page) * page
        self.allocator.evict_to_free_tokens(self.cache, need)
        new = self.allocator.alloc(need) if need else torch.empty(0, dtype=torch.int64)
        assert new is not None, "out of slots"
        if len(have) % page:  # the open page's remaining slots come first
            last = int(have[-1])
            new = torch.cat((torch.arange(last + 1, last // page * page + page), new))
        self.rows.req_to_token[req.kv.req_pool_idx, :length] = torch.cat((have, new))[:length].int()
        req.kv.kv_allocated_len = length

    def finish(self, req: SimpleNamespace, *, checkpoint: bool = True) -> None:
        """As ``release_kv_cache``: insert, free the request's own slots, unlock."""
        end = req.kv.kv_allocated_len
        if checkpoint:
            self.cache.checkpoint(req, up_to=end)
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        start = req.kv.cache_protected_len
        self.allocator.free_segment(row[start:end].long(), start_pos=start)
        self.cache.unlock(req.lock)
        req.lock, req.kv.holds_kv, req.kv.kv_allocated_len = None, False, 0

    def run(self, tokens: list[int], lora_id: str | None = None, **extra: Any) -> SimpleNamespace:
        """One whole request."""
        req = self.request(tokens, lora_id, **extra)
        self.admit(req)
        self.finish(req)
        return req

    def balance(self) -> int:
        """Slots that SGLang's leak check would miss; 0 when nothing runs and nothing leaked."""
        free = self.allocator.available_size()
        return self.size - free - self.cache.evictable_size() - self.cache.protected_size()
