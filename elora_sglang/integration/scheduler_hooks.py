"""Small hooks in the scheduler process: bind the pool, report the state."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from elora_sglang.integration.radix_cache import EloraRadixCache
from elora_sglang.runtime.pool import UnifiedPool

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.scheduler_components.internal_state import (
        SchedulerInternalStateController,
    )
    from sglang.srt.model_executor.model_runner import ModelRunner


def bind_pool(result: None, runner: ModelRunner) -> None:
    """AFTER ``ModelRunner._init_post_memory_pool_components``: adapters live in this KV pool from now on.

    Must run before CUDA graphs are captured, because the LoRA backend reads the pool's base pointers.
    """
    manager = runner.lora_manager
    if manager is None:
        return
    kv = runner.token_to_kv_pool
    manager.memory_pool.attach(manager)
    manager.memory_pool.bind(UnifiedPool(kv.k_buffer, kv.v_buffer, page_size=runner.page_size))


def on_tick(result: Any, scheduler: Scheduler) -> None:
    """AFTER ``Scheduler._process_hicache_events``: once per scheduler iteration, before the next batch is formed.

    Rows and tree are settled here in both event loops, so this is where the auditor looks.
    """
    cache = scheduler.tree_cache
    auditor = cache.auditor if isinstance(cache, EloraRadixCache) else None
    if auditor is None or not auditor.due():
        return
    batches = (scheduler.running_batch, scheduler.last_batch, scheduler.cur_batch_for_debug)
    requests = [req for batch in batches if batch is not None for req in batch.reqs]
    if scheduler.chunked_req is not None:
        requests.append(scheduler.chunked_req)
    auditor.require_clean(requests)


def report_state(result: Any, controller: SchedulerInternalStateController, state: dict[str, Any]) -> None:
    """AFTER ``SchedulerInternalStateController._add_env_vars``: ``elora`` in ``/server_info``."""
    cache = controller.scheduler.tree_cache
    if not isinstance(cache, EloraRadixCache):
        return
    tree = cache.tree
    state["elora"] = {
        "evictable_slots": tree.evictable_size,
        "protected_slots": tree.protected_size,
        "free_slots": int(cache.token_to_kv_pool_allocator.available_size()),
        "resident_adapters": sorted(n.key for n in tree.adapters() if n.resident and n.key is not None),
        "counts": tree.counts(),
        **asdict(cache.stats),
        **(cache.auditor.counters() if cache.auditor is not None else {}),
    }
