"""LoRA weights on the way from the file to SGLang's stacked form."""

from elora_sglang.patches.base import Kind, Patch

PATCH = Patch(
    name="lora_weights",
    target="sglang.srt.lora.lora.LoRAAdapter._normalize_weights",
    kind=Kind.AROUND,
    hook="elora_sglang.integration.weights.peft.normalize_weights",
    why="rsLoRA, rank_pattern and alpha_pattern are scaled wrongly; partial q/k/v or gate/up groups fail",
    upstream="https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/lora/lora.py",
    remove_when="SGLang scales by PEFT's rules and accepts adapters with any subset of q/k/v and gate/up",
)
