"""Adapters load, are replaced and unload while serving: the scheduler processes."""

from elora_sglang.patches.base import Kind, Patch

_SOURCE = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/"
_HOOKS = "elora_sglang.integration.adapters.scheduler_side"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"

PATCHES = (
    Patch(
        name="adapter_read_once",
        target="sglang.srt.lora.lora_manager.LoRAManager._load_lora_adapter",
        kind=Kind.AROUND,
        hook=f"{_HOOKS}.load_from_files",
        why="an adapter's bytes are read once, and are the version that was asked for or are refused",
        upstream="https://github.com/sgl-project/sglang/issues/25351",
        remove_when="SGLang identifies adapters by content",
    ),
    Patch(
        name="adapter_tensors_without_pickle",
        target="sglang.srt.managers.tp_worker.BaseTpWorker.load_lora_adapter_from_tensors",
        kind=Kind.AROUND,
        hook=f"{_HOOKS}.load_from_tensors",
        why="takes the safetensors bytes that the tokenizer process made; a fault does not end the scheduler",
        upstream=_SOURCE + "managers/tp_worker.py",
        remove_when="SGLang sends LoRA tensors without pickle",
    ),
    Patch(
        name="adapter_fits_pool",
        target=f"{_SCHEDULER}.load_lora_adapter",
        kind=Kind.AROUND,
        hook=f"{_HOOKS}.load",
        why="refuses an adapter that the pool cannot hold, and pinned adapters that would fill it",
        upstream=_SOURCE + "managers/scheduler.py",
        remove_when="SGLang asks the LoRA memory pool whether an adapter fits",
    ),
    Patch(
        name="adapter_tensors_fit_pool",
        target=f"{_SCHEDULER}.load_lora_adapter_from_tensors",
        kind=Kind.AROUND,
        hook=f"{_HOOKS}.load",
        why="the same limits for adapters sent as tensors",
        upstream=_SOURCE + "managers/scheduler.py",
        remove_when="SGLang asks the LoRA memory pool whether an adapter fits",
    ),
    Patch(
        name="adapter_start_limits",
        target=f"{_SCHEDULER}.init_lora_overlap_loader",
        kind=Kind.AFTER,
        hook=f"{_HOOKS}.check_start_adapters",
        why="the same limits for --lora-paths, once the pool's size is known",
        upstream=_SOURCE + "managers/scheduler.py",
        remove_when="SGLang asks the LoRA memory pool whether an adapter fits",
    ),
    Patch(
        name="adapter_unload",
        target=f"{_SCHEDULER}.unload_lora_adapter",
        kind=Kind.AROUND,
        hook=f"{_HOOKS}.unload",
        why="unloading drops the adapter's branch of the tree: its slots and all KV computed with it",
        upstream="https://github.com/vllm-project/vllm/issues/42125",
        remove_when="SGLang tells the prefix cache that an adapter is unloaded",
    ),
)
