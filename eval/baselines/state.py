"""What a baseline server says about itself in ``/server_info``, under ``baseline``."""

from __future__ import annotations

import os
from typing import Any

from elora_sglang.eval.baselines import ENV_LINK
from elora_sglang.eval.baselines.hooks import device
from elora_sglang.eval.baselines.patches import PATCHES
from elora_sglang.integration.plugin.install import in_place


def report(result: None, controller: Any, state: dict[str, Any]) -> None:
    """AFTER the last contributor of SGLang's internal state: hooks in place, link, bytes moved, invalid KV.

    Mutates ``state``; plain types only.
    """
    emulated = device()
    state["baseline"] = {
        "link_gbps": float(os.environ.get(ENV_LINK, "0")),
        "hooks": sorted(p.name for p in PATCHES if in_place(p)),
        "moved_bytes": dict(emulated.moved),
        "copies": dict(emulated.copies),
        "adapter_loads": emulated.adapters,
        "stood_still_s": emulated.slept,
        **_slots(controller.scheduler),
    }


def _slots(scheduler: Any) -> dict[str, Any]:
    runner = scheduler.tp_worker.model_runner
    manager = getattr(runner, "lora_manager", None)
    found: dict[str, Any] = {"cached_tokens": int(sum(scheduler.tree_cache.total_size()))}
    if manager is None:
        return found
    pool = manager.memory_pool
    tensors = [t for buffers in (pool.A_buffer, pool.B_buffer) for layers in buffers.values() for t in layers]
    found["slot_buffer_bytes"] = sum(t.numel() * t.element_size() for t in tensors)
    found["resident_adapters"] = sorted(uid for uid in pool.uid_to_buffer_id if uid is not None)
    return found
