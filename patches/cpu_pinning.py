"""LoRA without an accelerator: stock's LoRA code asks for pinned memory, which is an error there."""

from elora_sglang.patches.base import Kind, Patch, When

_SOURCE = "https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/lora"


def _without_pinning(name: str, target: str, why: str, file: str) -> Patch:
    return Patch(
        name=name,
        target=f"sglang.srt.lora.{target}",
        kind=Kind.AROUND,
        hook="elora_sglang.platform.pinning.without_pinning",
        why=why,
        upstream=f"{_SOURCE}/{file}",
        remove_when="SGLang asks is_pin_memory_available() in its LoRA layers and backends, as its pools do",
        when=When.CPU,
    )


PATCHES = (
    _without_pinning(
        "cpu_lora_layers",
        "layers.get_lora_layer",
        "LoRA layers pin their output offsets when they are made",
        "layers.py",
    ),
    _without_pinning(
        "cpu_lora_merged_columns",
        "layers.MergedColumnParallelLinearWithLoRA.set_lora_info",
        "merged column layers pin their output offsets when the weights are set",
        "layers.py",
    ),
    _without_pinning(
        "cpu_lora_rows",
        "layers.RowParallelLinearWithLoRA.set_lora_info",
        "row layers pin their output offsets when the weights are set",
        "layers.py",
    ),
    _without_pinning(
        "cpu_lora_batch",
        "backend.torch_backend.TorchNativeLoRABackend.prepare_lora_batch",
        "the native LoRA backend pins the batch's segment tables",
        "backend/torch_backend.py",
    ),
)
