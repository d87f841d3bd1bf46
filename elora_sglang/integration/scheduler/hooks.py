"""The one step of a scheduler process that no subclass reaches: the LoRA pool learns of the KV pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from elora_sglang.integration.plugin import config
from elora_sglang.runtime.pool.views import UnifiedPool

if TYPE_CHECKING:
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
