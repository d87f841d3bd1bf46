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
_HOST = "mem_cache.pool_host.mha"
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
#: Module and name of each other target, below ``sglang.srt``; its hook in ``hooks.py``, its record's name, and why.
HOOKED = (
    ("lora.mem_pool", "LoRAMemoryPool.load_lora_weight_to_buffer", "load_adapter", "adapter_copy", _LATE),
    ("lora.lora_overlap_loader", "LoRAOverlapLoader.__init__", "overlap_loader", "overlap_loader", _LATE),
    ("managers.cache_controller", "HiCacheController.__init__", "controller", "hicache_streams", _LATE),
    ("mem_cache.pool_host.common", "alloc_with_host_register", "host_memory", "hicache_memory", _CPU),
    (_HOST, "MHATokenToKVPoolHost.load_to_device_per_layer", "load_layer", "hicache_load", _CPU),
    (_HOST, "MHATokenToKVPoolHost.backup_from_device_all_layer", "save_layers", "hicache_save", _CPU),
)


def _patch(name: str, module: str, target: str, hook: str, why: str, kind: Kind = Kind.AROUND) -> Patch:
    return Patch(
        name=f"baseline_{name}",
        target=f"sglang.srt.{module}.{target}",
        kind=kind,
        hook=f"elora_sglang.eval.baselines.{hook}",
        why=why,
        upstream=f"{_FILES}/{module.replace('.', '/')}.py",
        remove_when="comparisons run on a GPU",
    )


_TREE, _STATE = "mem_cache.unified_radix_cache", "managers.scheduler_components.internal_state"
PATCHES = (
    *(_patch(name, module, target, f"hooks.{hook}", why) for module, target, hook, name, why in HOOKED),
    _patch(
        "report", _STATE, "SchedulerInternalStateController._add_env_vars", "state.report",
        "the comparison refuses a baseline whose hooks it cannot see, and reads its bytes and residency", Kind.AFTER,
    ),
    *(
        _patch(f"record_{name}", _TREE, f"UnifiedRadixCache.{method}", f"record.{name}", _RECORD)
        for method, name in RECORDED.items()
    ),
)  # fmt: skip

if __name__ == "__main__":
    write_manifest(PATCHES, MANIFEST)
