"""Stock SGLang as a baseline of ``python -m elora_sglang.eval live``: copies late by one link model, HiCache on a CPU.

Records like those of ``patches/``, but not among them: the product does not know them. Only a server that was started
by ``python -m elora_sglang.eval.baselines.launch`` has them, in its scheduler processes. ``targets.json`` here keeps
what each target looked like; ``python -m elora_sglang.eval.baselines.patches`` reads them again.
"""

from pathlib import Path

from elora_sglang.patches.base import Kind, Patch, write_manifest

#: What the targets looked like when they were last read.
MANIFEST = Path(__file__).with_name("targets.json")

_FILES = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt"
_HOOKS = "elora_sglang.eval.baselines"
_LATE = "a CPU has no link: without a model of it every copy of the baseline would be free"
_RECORD = "the simulator is asked what this cache was asked, in the same order (eval fidelity)"
#: Method of SGLang's prefix cache, and the function of ``eval/baselines/record.py`` that writes its calls down.
RECORDED = {
    "_match_tree": "match",
    "insert": "insert",
    "inc_lock_ref": "lock",
    "dec_lock_ref": "unlock",
    "_evict": "evict",
    "evict_host": "evict_host",
    "_track_write_through_node": "backup",
    "load_back": "load_back",
    "reset": "reset",
}
_CPU = "the wheel's HiCache asks for a GPU driver and for compiled copies"


def _around(name: str, module: str, target: str, hook: str, why: str) -> Patch:
    return Patch(
        name=f"baseline_{name}",
        target=f"sglang.srt.{module}.{target}",
        kind=Kind.AROUND,
        hook=f"{_HOOKS}.{hook}",
        why=why,
        upstream=f"{_FILES}/{module.replace('.', '/')}.py",
        remove_when="comparisons run on a GPU",
    )


PATCHES = (
    _around(
        "adapter_copy",
        "lora.mem_pool",
        "LoRAMemoryPool.load_lora_weight_to_buffer",
        "hooks.load_adapter",
        _LATE,
    ),
    _around(
        "overlap_loader",
        "lora.lora_overlap_loader",
        "LoRAOverlapLoader.__init__",
        "hooks.overlap_loader",
        _LATE,
    ),
    _around(
        "hicache_streams",
        "managers.cache_controller",
        "HiCacheController.__init__",
        "hooks.controller",
        _LATE,
    ),
    _around(
        "hicache_memory",
        "mem_cache.pool_host.common",
        "alloc_with_host_register",
        "hooks.host_memory",
        _CPU,
    ),
    _around(
        "hicache_load",
        "mem_cache.pool_host.mha",
        "MHATokenToKVPoolHost.load_to_device_per_layer",
        "hooks.load_layer",
        _CPU,
    ),
    _around(
        "hicache_save",
        "mem_cache.pool_host.mha",
        "MHATokenToKVPoolHost.backup_from_device_all_layer",
        "hooks.save_layers",
        _CPU,
    ),
    Patch(
        name="baseline_report",
        target="sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController._add_env_vars",
        kind=Kind.AFTER,
        hook=f"{_HOOKS}.state.report",
        why="the comparison refuses a baseline whose hooks it cannot see, and reads its bytes and residency",
        upstream=f"{_FILES}/managers/scheduler_components/internal_state.py",
        remove_when="comparisons run on a GPU",
    ),
    *(
        _around(
            f"record_{name}",
            "mem_cache.unified_radix_cache",
            f"UnifiedRadixCache.{method}",
            f"record.{name}",
            _RECORD,
        )
        for method, name in RECORDED.items()
    ),
)

if __name__ == "__main__":
    write_manifest(PATCHES, MANIFEST)
