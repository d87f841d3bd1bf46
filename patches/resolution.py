"""Argument resolution in the launcher: the settings that ``--elora`` implies, and the last checks."""

from elora_sglang.patches.base import Kind, Patch, Process

_RESOLUTION_HOOKS = "sglang.srt.arg_groups.resolution_hooks"

PATCHES = (
    Patch(
        name="implied_settings",
        target=f"{_RESOLUTION_HOOKS}.register_resolution_hook",
        kind=Kind.REGISTRY,
        key="handle_missing_default_values",
        registry=f"{_RESOLUTION_HOOKS}._HOOKS",
        hook="elora_sglang.integration.plugin.launch.imply_settings",
        why="--elora alone is enough: LoRA on, backends `elora`, target modules and LoRA rank supplied",
        upstream="https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/arg_groups/lora_hook.py",
        remove_when="SGLang offers LoRA backends and radix caches of plugins as --lora-backend choices",
        process=Process.MAIN,
    ),
    Patch(
        name="final_checks",
        target=f"{_RESOLUTION_HOOKS}.register_resolution_hook",
        kind=Kind.REGISTRY,
        key="validate_deepep_v2_dispatch_token_budget",
        registry=f"{_RESOLUTION_HOOKS}._HOOKS",
        hook="elora_sglang.integration.plugin.launch.final_checks",
        why="refuses what ELORA does not support once every setting and the model are known",
        upstream="https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/arg_groups/pipeline.py",
        remove_when="SGLang has a named last step in its resolution pipeline",
        process=Process.MAIN,
    ),
)
