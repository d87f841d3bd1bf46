"""Small hooks in the scheduler process: bind the pool, tick the swapper, report the state."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from elora_sglang.integration.cache import state as cache_state
from elora_sglang.integration.cache.radix_cache import EloraRadixCache
from elora_sglang.integration.plugin import config
from elora_sglang.integration.scheduler.receiver import TickReceiver
from elora_sglang.runtime.pool.views import UnifiedPool

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
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
    manager.memory_pool.graph_rank = config.current(runner.server_args).graph_rank
    manager.memory_pool.bind(UnifiedPool(kv.k_buffer, kv.v_buffer, page_size=runner.page_size))


def _cache(scheduler: Scheduler) -> EloraRadixCache | None:
    cache = scheduler.tree_cache
    return cache if isinstance(cache, EloraRadixCache) else None


def share_ticks(result: None, scheduler: Scheduler) -> None:
    """AFTER ``Scheduler.init_request_receiver``: the receiver also carries rank 0's tick to all ranks."""
    cache = _cache(scheduler)
    if cache is not None:
        scheduler.request_receiver = TickReceiver.over(scheduler.request_receiver, cache.ticks)


def on_enqueue(result: None, scheduler: Scheduler, req: Req, is_retracted: bool = False) -> None:
    """AFTER ``Scheduler._add_request_to_queue``: what the request needs can start moving now."""
    cache = _cache(scheduler)
    # SGLang refuses a request at its door by not queuing it.
    if cache is not None and scheduler.waiting_queue and scheduler.waiting_queue[-1] is req:
        cache.enqueued(req)


def on_tick(result: Any, scheduler: Scheduler, *args: Any, **kwargs: Any) -> None:
    """AFTER ``Scheduler._process_hicache_events``: once per scheduler iteration, before the next batch is formed.

    Rows and tree are settled here in both event loops, so this is where the swapper decides and the auditor
    looks.
    """
    cache = _cache(scheduler)
    if cache is None:
        return
    chunked, promised = scheduler.chunked_req, 0
    if chunked is not None:
        left = len(chunked.full_untruncated_fill_ids) - (chunked.extend_end or 0)
        promised = max(left, 0) + 2 * cache.page_size
    cache.tick(len(scheduler.running_batch.reqs), bool(scheduler.waiting_queue), promised)
    auditor = cache.auditor
    if auditor is None or not auditor.due():
        return
    batches = (scheduler.running_batch, scheduler.last_batch, scheduler.cur_batch_for_debug)
    requests = [req for batch in batches if batch is not None for req in batch.reqs]
    if scheduler.chunked_req is not None:
        requests.append(scheduler.chunked_req)
    auditor.require_clean(requests)


def before_batch(scheduler: Scheduler, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``Scheduler.run_batch``: the queue's logical time, which counts batches, goes on.

    And slots that were given away while they were saved are not written yet.
    """
    cache = _cache(scheduler)
    if cache is None:
        return
    mode = batch.forward_mode
    if not mode.is_idle():
        prefill = mode.is_extend()
        cache.fairness.batch(
            (req.rid for req in batch.reqs), prefill=prefill, decode=mode.is_mixed() or not prefill
        )
    if cache.tier is not None:
        cache.tier.engine.before_forward(batch.out_cache_loc)


def on_result(result: None, scheduler: Scheduler, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> None:
    """AFTER ``Scheduler.process_batch_result``: how long this batch took refines the costs."""
    cache = _cache(scheduler)
    if cache is None or cache.meter is None:
        return
    now = time.monotonic()
    if batch.forward_mode.is_extend() and batch.launch_ts is not None:
        cache.meter.prefill(batch.launch_ts, now, batch.extend_num_tokens or 0)
    else:
        cache.meter.decode(now)


def report_state(result: Any, controller: SchedulerInternalStateController, state: dict[str, Any]) -> None:
    """AFTER ``SchedulerInternalStateController._add_env_vars``: ``elora`` in ``/server_info``."""
    cache = controller.scheduler.tree_cache
    if isinstance(cache, EloraRadixCache):
        state["elora"] = cache_state.of(cache)
