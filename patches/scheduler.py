"""The scheduler processes: scheduler, prefix cache, and the order in which pools are made."""

from elora_sglang.patches.base import Kind, Patch

_SOURCE = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/"

PATCHES = (
    Patch(
        name="scheduler",
        target="sglang.srt.managers.scheduler.Scheduler",
        kind=Kind.REPLACE,
        hook="elora_sglang.integration.scheduler.scheduler.EloraScheduler",
        why="admission reserves adapter slots and tokens together; the swapper decides once per iteration",
        upstream="https://github.com/sgl-project/sglang/issues/23141",
        remove_when="SGLang asks the prefix cache what a request needs, and calls it once per iteration and batch",
    ),
    Patch(
        name="scheduler_start",
        target="sglang.srt.managers.scheduler.configure_scheduler_process",
        kind=Kind.BEFORE,
        hook="elora_sglang.integration.plugin.verify.at_scheduler_start",
        why="notices, before any weight is loaded, a hook that SGLang failed to apply",
        upstream=_SOURCE + "plugins/hook_registry.py",
        remove_when="SGLang lets a plugin ask for failing hooks to be fatal",
    ),
    Patch(
        name="radix_cache",
        target="sglang.srt.mem_cache.registry.register_radix_cache_backend",
        kind=Kind.REGISTRY,
        key="elora",
        registry="sglang.srt.mem_cache.registry._RADIX_CACHE_REGISTRY",
        hook="elora_sglang.integration.cache.wiring.create",
        why="one tree for adapters and KV, in which a KV node pins its adapter",
        upstream=_SOURCE + "mem_cache/registry.py",
        remove_when="never: a registry is the intended way",
    ),
    Patch(
        name="bind_pool",
        target="sglang.srt.model_executor.model_runner.ModelRunner._init_post_memory_pool_components",
        kind=Kind.AFTER,
        hook="elora_sglang.integration.scheduler.hooks.bind_pool",
        why="the LoRA pool learns of the KV pool before CUDA graphs are captured",
        upstream=_SOURCE + "model_executor/model_runner.py",
        remove_when="SGLang builds the LoRA memory pool after the KV pool",
    ),
)
