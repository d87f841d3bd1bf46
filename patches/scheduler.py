"""The scheduler process: prefix cache, admission, state."""

from elora_sglang.patches.base import Kind, Patch

_SCHEDULER = "sglang.srt.managers.scheduler"
_SOURCE = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/"

PATCHES = (
    Patch(
        name="scheduler_start",
        target=f"{_SCHEDULER}.configure_scheduler_process",
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
        name="prefill_adder",
        target=f"{_SCHEDULER}.Scheduler.get_prefill_adder_class",
        kind=Kind.AROUND,
        hook="elora_sglang.integration.scheduler.admission.prefill_adder_class",
        why="admission reserves a request's adapter slots and tokens together",
        upstream="https://github.com/sgl-project/sglang/issues/23141",
        remove_when="SGLang asks the prefix cache what a request needs besides its tokens",
    ),
    Patch(
        name="lora_slot_check",
        target=f"{_SCHEDULER}.Scheduler.can_schedule_lora_req",
        kind=Kind.AROUND,
        hook="elora_sglang.integration.scheduler.admission.can_schedule_lora_req",
        why="there are no LoRA slots to count; an aborted request gives up its adapter here",
        upstream="https://github.com/sgl-project/sglang/issues/25865",
        remove_when="SGLang asks the LoRA backend whether an adapter can be scheduled",
    ),
    Patch(
        name="request_limits",
        target=f"{_SCHEDULER}.Scheduler.init_req_max_new_tokens",
        kind=Kind.AROUND,
        hook="elora_sglang.integration.scheduler.admission.init_req_max_new_tokens",
        why="a request whose adapter and tokens can never fit together is answered with an error, not queued",
        upstream=_SOURCE + "mem_cache/allocator/base.py",
        remove_when="SGLang's bound on new tokens asks the prefix cache what else the request pins",
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
    Patch(
        name="scheduler_tick",
        target=f"{_SCHEDULER}.Scheduler._process_hicache_events",
        kind=Kind.AFTER,
        hook="elora_sglang.integration.scheduler.hooks.on_tick",
        why="once per scheduler iteration, in every event loop: the swapper decides and the auditor looks here",
        upstream=_SOURCE + "managers/scheduler.py",
        remove_when="SGLang calls the prefix cache once per iteration, whatever the cache",
    ),
    Patch(
        name="shared_tick",
        target=f"{_SCHEDULER}.Scheduler.init_request_receiver",
        kind=Kind.AFTER,
        hook="elora_sglang.integration.scheduler.hooks.share_ticks",
        why="time and finished copies as rank 0 saw them reach all ranks with the requests, so that all decide alike",
        upstream=_SOURCE + "managers/scheduler_components/request_receiver.py",
        remove_when="SGLang lets the prefix cache add to the per-iteration broadcast",
    ),
    Patch(
        name="request_queued",
        target=f"{_SCHEDULER}.Scheduler._add_request_to_queue",
        kind=Kind.AFTER,
        hook="elora_sglang.integration.scheduler.hooks.on_enqueue",
        why="a waiting request's adapter and KV start moving the moment it is queued",
        upstream=_SOURCE + "managers/scheduler.py",
        remove_when="SGLang tells the prefix cache of a queued request without HiCache storage, too",
    ),
    Patch(
        name="batch_fenced",
        target=f"{_SCHEDULER}.Scheduler.run_batch",
        kind=Kind.BEFORE,
        hook="elora_sglang.integration.scheduler.hooks.before_batch",
        why="a batch may write slots that were evicted a moment ago only once their copy to the host is made",
        upstream=_SOURCE + "managers/scheduler.py",
        remove_when="SGLang asks the prefix cache before it launches a batch, HiCache or not",
    ),
    Patch(
        name="batch_timed",
        target=f"{_SCHEDULER}.Scheduler.process_batch_result",
        kind=Kind.AFTER,
        hook="elora_sglang.integration.scheduler.hooks.on_result",
        why="seconds per prefilled token, which the score weighs against a copy from the host",
        upstream=_SOURCE + "managers/scheduler.py",
        remove_when="SGLang exports the duration of a batch inside the process",
    ),
    Patch(
        name="report_state",
        target=(
            "sglang.srt.managers.scheduler_components.internal_state"
            ".SchedulerInternalStateController._add_env_vars"
        ),
        kind=Kind.AFTER,
        hook="elora_sglang.integration.scheduler.hooks.report_state",
        why="sizes and counters of tree and pool in /server_info",
        upstream=_SOURCE + "managers/scheduler_components/internal_state.py",
        remove_when="SGLang lets the prefix cache contribute to the internal state",
    ),
)
