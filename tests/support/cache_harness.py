"""White-box harness: the real cache, tree, pools, transfers and request rows, without a model or a server.

Only adapters and the model are stand-ins: :class:`FilledPool` writes recognisable bytes into real pool rows, and
"computing" KV writes a number that depends on the adapter and on every token before it. So a slot that holds
somebody else's bytes shows.
"""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestHandle,
    InitLoadBackParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from support.lora_bytes import FilledPool

from elora_sglang.core.costs import Costs
from elora_sglang.integration.cache import wiring
from elora_sglang.integration.plugin.config import EloraConfig
from elora_sglang.runtime.host_tier import HostTier
from elora_sglang.runtime.pool.host import HostPool
from elora_sglang.runtime.pool.views import UnifiedPool
from elora_sglang.runtime.transfers.engine import TransferEngine
from elora_sglang.runtime.transfers.link import Link

LAYERS = 2
ROW_BYTES = 16


def _number(lora_id: str | None, tokens: Any) -> int:
    """What the KV of the last of ``tokens`` is: depends on the adapter and on all of them."""
    value = 7 if lora_id is None else sum(lora_id.encode()) + 13
    for token in tokens:
        value = (value * 1_000_003 + token + 1) % (1 << 61)
    return value


class Harness:
    """A cache over a pool of ``size`` slots, and requests that go through SGLang's own sequence of calls.

    Args:
        host: slots of the host tier; 0: none.
        gbps: bandwidth of an emulated link: copies are late.
        settings: further ELORA settings.
        costs: what the manager starts from.
    """

    def __init__(
        self,
        size: int,
        adapters: dict[str, int],
        *,
        page_size: int = 1,
        pinned: set[str] | None = None,
        host: int = 0,
        gbps: float = 0.0,
        settings: dict[str, Any] | None = None,
        costs: Costs | None = None,
    ) -> None:
        make: Any = TokenToKVPoolAllocator if page_size == 1 else PagedTokenToKVPoolAllocator
        arguments: dict[str, Any] = {} if page_size == 1 else {"page_size": page_size}
        self.allocator = make(
            size, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False, **arguments
        )
        self.rows = ReqToTokenPool(1024, 1024, "cpu", enable_memory_saver=False)
        self.page_size = page_size
        self.size = size
        shape = (size + page_size, 1, ROW_BYTES)
        k, v = ([torch.zeros(shape, dtype=torch.uint8) for _ in range(LAYERS)] for _ in (0, 1))
        self.pool = UnifiedPool(k, v, page_size=page_size)
        self.weights = FilledPool(adapters, self.pool, pinned or set())
        self.tier: HostTier | None = None
        if host:
            pool = HostPool(host, self.pool, pin=False)
            link = Link(gbps) if gbps else None
            self.engine = TransferEngine(self.pool, pool, link, None)
            self.tier = HostTier(pool, self.engine, link, costs or Costs.default())
        params = SimpleNamespace(
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=page_size,
            is_eagle=False,
            enable_metrics=False,
        )
        self._now = 0.0
        self.cache = wiring.build(
            params,
            weights=self.weights,
            settings=EloraConfig(enabled=True, audit_interval=1, **(settings or {})),
            tier=self.tier,
            clock=self._clock,
        )
        self._next_row = self._requests = 0

    def _clock(self) -> float:
        # The swapper plans every tenth of a second; here every tick is one of its plans.
        self._now += 0.1001
        return self._now

    def request(self, tokens: list[int], lora_id: str | None = None, **extra: Any) -> Any:
        """A request that has not been matched yet. ``extra``: ``extra_key``, ``cache_salt``, ``custom_params``."""
        key = extra.get("extra_key")
        self._requests += 1
        req = SimpleNamespace(
            rid=f"r{self._requests}",
            lora_id=lora_id,
            extra_key=(key or "") + lora_id if lora_id else key,
            cache_salt=extra.get("cache_salt"),
            sampling_params=SimpleNamespace(custom_params=extra.get("custom_params")),
            origin_input_ids=array("q", tokens),
            output_ids=array("q"),
            full_untruncated_fill_ids=array("q", tokens),
            refresh_fill_ids=lambda: None,
            positional_embed_overrides=None,
            retracted_stain=False,
            to_finish=None,
            done=False,
            finished=lambda: True,
            prefix_len=0,
            host_hit_length=0,
            host_loaded_length=0,
            last_node=None,
            best_match_node=None,
            lock=None,
            kv=SimpleNamespace(
                req_pool_idx=None,
                cache_protected_len=0,
                cache_inserted_len=0,
                kv_allocated_len=0,
                holds_kv=False,
            ),
        )
        req.init_next_round_input = lambda cache: self.match(req)
        return req

    def match(self, req: Any) -> int:
        """As ``Req.init_next_round_input``: at most all tokens but the last."""
        ids = req.full_untruncated_fill_ids
        key = RadixKey(ids, req.extra_key, limit=max(0, len(ids) - 1), cache_salt=req.cache_salt)
        result = self.cache.match_prefix(MatchPrefixParams(key=key, req=req))
        req.prefix_len, req.last_node = result.device_prefix_len, result.last_device_node
        req.best_match_node, req.host_hit_length = result.best_match_node, result.host_hit_length
        req.host_loaded_length = 0
        req.kv.cache_protected_len = req.prefix_len
        return int(req.prefix_len)

    def enqueue(self, req: Any) -> Any:
        """As ``Scheduler._add_request_to_queue``."""
        self.cache.enqueued(req)
        return req

    def tick(self, running: int = 0) -> None:
        """One scheduler iteration without a batch."""
        self.cache.tick(running, False)

    def abort(self, req: Any) -> None:
        """A waiting request is aborted."""
        self.cache.release_aborted_request(CacheRequestHandle(req.rid, 0))

    def fits(self, req: Any) -> bool:
        """As admission: whether the request's tokens and its adapter fit, whatever has to leave for them."""
        room = self.allocator.available_size() + self.cache.evictable_size()
        adapter = self.weights.sizes.get(req.lora_id, 0)
        return bool(room > len(req.full_untruncated_fill_ids) + adapter + 2 * self.page_size)

    def wait_for_room(self, req: Any) -> None:
        """Tick while copies in flight hold what the request needs."""
        while not self.fits(req) and self.cache.driver.busy:
            self.tick(1)

    def admit(self, req: Any) -> None:
        """As ``PrefillAdder.add_one_req`` and the forward after it; raises when it does not fit."""
        self.wait_for_room(req)
        self.cache.begin_pass(None)
        self.match(req)
        adapter = self.cache.tree.adapter_of(req.last_node)
        if not adapter.resident:
            assert self.cache.executor.bring_in(adapter), "no room for the adapter"
            if not req.last_node.resident:  # KV that had outlived its adapter made room for it
                self.match(req)
        held = self.cache.lock(req.last_node)
        if req.host_hit_length:
            params = InitLoadBackParams(req.best_match_node, req.host_hit_length, req=req)
            loaded = self.cache.init_load_back(params)
            assert loaded is not None
            req.host_loaded_length, req.last_node = loaded
            assert req.host_loaded_length in (0, req.host_hit_length)
            req.prefix_len += req.host_loaded_length
            req.kv.cache_protected_len = req.prefix_len
        req.lock = self.cache.lock(req.last_node)
        self.cache.unlock(held)
        self.cache.admitted(req)
        self._next_row = self._next_row % 1000 + 1  # far more rows than requests run at once
        req.kv.req_pool_idx = self._next_row
        req.kv.holds_kv = True
        self._extend_row(req, self.cache.prefix_device_indices(req))
        self.forward(req, req.prefix_len)

    def grow(self, req: Any, tokens: list[int]) -> None:
        """Decode: append tokens and slots for them."""
        start = len(req.full_untruncated_fill_ids)
        req.output_ids.extend(tokens)
        req.full_untruncated_fill_ids.extend(tokens)
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        self._extend_row(req, row[: req.kv.kv_allocated_len].long())
        self.forward(req, start)

    def forward(self, req: Any, start: int) -> None:
        """Compute tokens from ``start`` on, after checking that all before hold what they must, layer by layer."""
        ids = req.full_untruncated_fill_ids
        slots = self.rows.req_to_token[req.kv.req_pool_idx][: len(ids)].long()
        want = torch.tensor([_number(req.lora_id, ids[: i + 1]) for i in range(len(ids))])
        if self.tier is not None:
            self.engine.before_forward(slots[start:])
        for layer in range(LAYERS):
            if self.tier is not None:
                self.tier.wait_until(layer)
            if req.lora_id is not None and req.lora_id in self.weights.sizes:
                mine = self.pool.byte_rows(layer, 0)[self.weights.resident[req.lora_id]]
                assert bool((mine == self.weights.byte(req.lora_id)).all()), "adapter bytes"
            for stream in (0, 1):
                words = self.pool.word_rows(layer, stream)
                wrong = (words[slots[:start], 0] != want[:start]).nonzero().flatten().tolist()
                assert not wrong, f"{req.rid}: tokens {wrong[:5]} of its prefix {start} hold other KV"
                words[slots[start:]] = want[start:, None]

    def _extend_row(self, req: Any, have: torch.Tensor) -> None:
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

    def finish(self, req: Any, *, checkpoint: bool = True) -> None:
        """As ``release_kv_cache``: insert, free the request's own slots, unlock."""
        end = req.kv.kv_allocated_len
        if checkpoint:
            self.cache.checkpoint(req, up_to=end)
        row = self.rows.req_to_token[req.kv.req_pool_idx]
        start = req.kv.cache_protected_len
        self.allocator.free_segment(row[start:end].long(), start_pos=start)
        self.cache.unlock(req.lock)
        req.lock, req.kv.holds_kv, req.kv.kv_allocated_len = None, False, 0
        self.cache.on_release(req, checkpointed=checkpoint)

    def run(self, tokens: list[int], lora_id: str | None = None, **extra: Any) -> Any:
        """One whole request."""
        req = self.request(tokens, lora_id, **extra)
        self.admit(req)
        self.finish(req)
        return req

    def balance(self) -> int:
        """Slots that SGLang's leak check would miss; 0 when nothing runs and nothing leaked."""
        free = self.allocator.available_size()
        return self.size - free - self.cache.evictable_size() - self.cache.protected_size()
