"""Control requests that ``--elora`` refuses: new base weights, and release of the pool's memory."""

from elora_sglang.patches.base import Kind, Patch, Process

_MANAGERS = "sglang.srt.managers"
_CONTROL = f"{_MANAGERS}.tokenizer_control_mixin.TokenizerControlMixin"
_HOOKS = "elora_sglang.integration.plugin.refusals_control"
_TOKENIZER = f"{_MANAGERS}.tokenizer_manager.TokenizerManager"
_WEIGHTS = "KV and adapters in the pool belong to the base weights they were computed with"
_MEMORY = "adapters live in the memory that would be released"


def _refused(target: str, hook: str, why: str) -> Patch:
    module = target.split(".")[3]
    return Patch(
        name=f"refuse_{target.rpartition('.')[2]}",
        target=target,
        kind=Kind.AROUND,
        hook=f"{_HOOKS}.{hook}",
        why=why,
        upstream=f"https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/managers/{module}.py",
        remove_when="ELORA drops the tree, and moves the adapters, when weights or memory change",
        process=Process.TOKENIZER,
    )


PATCHES = (
    _refused(f"{_TOKENIZER}.update_weights_from_disk", "update_weights_from_disk", _WEIGHTS),
    _refused(f"{_CONTROL}.update_weights_from_distributed", "update_weights", _WEIGHTS),
    _refused(f"{_CONTROL}.update_weights_from_tensor", "update_weights", _WEIGHTS),
    _refused(f"{_CONTROL}.update_weights_from_ipc", "update_weights", _WEIGHTS),
    _refused(f"{_CONTROL}.begin_weight_update", "update_weights", _WEIGHTS),
    _refused(f"{_CONTROL}.release_memory_occupation", "occupy_memory", _MEMORY),
    _refused(f"{_CONTROL}.resume_memory_occupation", "occupy_memory", _MEMORY),
)
