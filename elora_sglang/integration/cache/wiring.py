"""Builds a prefix cache and all that works below it. Nothing else does, and nothing here is kept: the cache has it all.

::

    EloraRadixCache ── SGLang's calls, as events ──▶ CacheManager (decides)
          ├── SwapDriver     carries out what was decided: slots, copies, files
          ├── TreeAdapters   adapters as nodes of the tree
          ├── BatchFences    which copies a batch has to wait for
          ├── TickSource     time, ended copies and costs, the same on every rank
          ├── CostMeter      rank 0: what things cost here
          ├── Auditor        --elora-audit-interval
          └── TraceFile      --elora-trace-out
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from elora_sglang.core.costs import Costs
from elora_sglang.core.manager import CacheManager, Load, SwapSettings
from elora_sglang.core.swapper import parts
from elora_sglang.integration.cache import host_tier
from elora_sglang.integration.cache.radix_cache import CacheParts, EloraRadixCache
from elora_sglang.integration.plugin import config, verify
from elora_sglang.runtime import trace_file
from elora_sglang.runtime.audit.device import Auditor
from elora_sglang.runtime.audit.witnesses import Witnesses
from elora_sglang.runtime.cost_meter import CostMeter
from elora_sglang.runtime.fences import BatchFences
from elora_sglang.runtime.pool.slots import SlotPayloads
from elora_sglang.runtime.swap_driver import CacheStats, SwapDriver
from elora_sglang.runtime.ticks import TickSource
from elora_sglang.runtime.tree_adapters import TreeAdapters

if TYPE_CHECKING:
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

    from elora_sglang.runtime.host_tier import HostTier
    from elora_sglang.runtime.lora_pool import LoRAPool


def create(ctx: TreeCacheBuildContext) -> EloraRadixCache:
    """Factory registered as radix-cache backend ``elora`` (SGLang: ``mem_cache/registry.py``).

    Runs in every scheduler process, after all hooks were applied, which makes it the place where a
    hook that SGLang silently failed to apply is noticed: it raises, and the server does not start.
    """
    settings = config.current(ctx.server_args)
    verify.require_hooks(settings)
    if ctx.params.enable_kv_cache_events:
        raise SystemExit("elora: --kv-events-config is not supported with --elora; remove it.")
    runner = ctx.tp_worker.model_runner
    weights = runner.lora_manager.memory_pool
    stream = getattr(runner, "forward_stream", None)
    tier = host_tier.build(settings, weights.pool, ctx.params.token_to_kv_pool_allocator.size, stream)
    cache = build(ctx.params, weights=weights, settings=settings, tier=tier, forward_stream=stream)
    if tier is not None:
        runner.token_to_kv_pool.register_layer_transfer_counter(tier)
    return cache


def build(
    params: CacheInitParams,
    *,
    weights: LoRAPool,
    settings: config.EloraConfig | None = None,
    tier: HostTier | None = None,
    forward_stream: Any = None,
    clock: Callable[[], float] = time.monotonic,
) -> EloraRadixCache:
    """A prefix cache of one scheduler process, and what is below it.

    Mutates ``weights``: its host side is bound to the host pool, and its batches wait for the tier's copies.

    Args:
        params: SGLang's construction arguments (pools, page size, metrics switch).
        weights: the LoRA pool whose adapters live in slots of the cache's allocator.
        settings: ELORA's flags: the policy, the swapper's watermarks, the trace, how often to audit.
        tier: the host tier; ``None`` without one.
        forward_stream: CUDA stream of model forwards; adapter loads are ordered behind it.
        clock: seconds, monotonic, for the ticks.
    """
    settings = settings if settings is not None else config.EloraConfig()
    allocator = params.token_to_kv_pool_allocator
    manager = build_manager(settings, tier, page_size=params.page_size, slots=allocator.size)
    rank, ranks = host_tier.ranks()
    meter = CostMeter(manager.costs, fixed_links=tier is None or tier.link is not None) if rank == 0 else None
    loading: dict[int, Load] = {}
    auditor = None
    if settings.audit_interval:
        host = None if tier is None else tier.host
        witnesses = Witnesses(
            manager.tree, allocator, params.req_to_token_pool, weights, host, loading.keys(), params.page_size
        )
        auditor = Auditor(witnesses, interval=settings.audit_interval)
    driver = SwapDriver(manager, allocator, weights, tier, CacheStats(), meter, auditor, loading)
    if tier is not None:
        weights.store.bind(tier.host)
        weights.layer_fence = tier.wait_until
    return EloraRadixCache(
        params,
        CacheParts(
            manager=manager,
            weights=weights,
            tier=tier,
            driver=driver,
            adapters=TreeAdapters(driver, weights, _behind(forward_stream, weights)),
            fences=BatchFences(None if tier is None else tier.engine, loading.keys()),
            ticks=TickSource(driver.finished, _news(meter, tier), shared=ranks > 1, clock=clock),
            meter=meter,
            auditor=auditor,
            trace=trace_file.record(manager, settings.trace_out, rank),
            follower=rank > 0,
        ),
    )


def build_manager(
    settings: config.EloraConfig, tier: HostTier | None, *, page_size: int, slots: int
) -> CacheManager:
    """The manager of one scheduler process; without a tier it has no host slots and plans no copies."""
    return CacheManager(
        page_size=page_size,
        device_slots=slots,
        policy_name=settings.policy,
        payloads=SlotPayloads(),
        settings=SwapSettings(
            host_slots=0 if tier is None else tier.host.num_slots,
            busy_watermark=settings.busy_watermark,
            idle_watermark=settings.idle_watermark,
            swap_interval_s=settings.swap_interval,
            lora_share=settings.lora_share,
            **parts(settings.without_terms),
        ),
        costs=Costs.default() if tier is None else tier.costs,
    )


def _news(meter: CostMeter | None, tier: HostTier | None) -> Callable[[], Costs | None]:
    """Asks for refined costs; only rank 0, which has a meter, ever has any."""

    def news() -> Costs | None:
        if meter is None:
            return None
        load, save = (None, None) if tier is None else tier.bandwidths()
        return meter.news(load, save)

    return news


def _behind(forward_stream: Any, weights: LoRAPool) -> Callable[[], None]:
    """Orders what comes next on the current stream behind the last launched forward.

    That forward may still write KV into slots that were freed a moment ago: with the overlap scheduler 4-31 % of
    adapter loads in a prototype landed on such slots.
    """

    def order() -> None:
        if forward_stream is not None and weights.on_cuda:
            torch.cuda.current_stream().wait_stream(forward_stream)

    return order
