"""LoRA weights: read once, kept in the token pool instead of slot buffers, and computed from there."""

from elora_sglang.patches.base import Kind, Patch

PATCHES = (
    Patch(
        name="lora_memory_pool",
        target="sglang.srt.lora.mem_pool.LoRAMemoryPool",
        kind=Kind.REPLACE,
        hook="elora_sglang.integration.weights.pool.EloraLoRAMemoryPool",
        why="adapters live in KV token slots; the static slot buffers are never allocated",
        upstream="https://github.com/sgl-project/sglang/issues/3647",
        remove_when="SGLang pages LoRA weights in the KV pool, or lets a LoRA backend bring its memory pool",
    ),
    Patch(
        name="lora_backend",
        target="sglang.srt.lora.backend.lora_registry.register_lora_backend",
        kind=Kind.REGISTRY,
        key="elora",
        registry="sglang.srt.lora.backend.lora_registry.LORA_SUPPORTED_BACKENDS",
        hook="elora_sglang.integration.weights.backend.create",
        why="LoRA compute reads the weights from the slots of the token pool",
        upstream="https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/lora/backend/lora_registry.py",
        remove_when="never: a registry is the intended way",
    ),
    Patch(
        name="lora_manager",
        target="sglang.srt.lora.lora_manager.LoRAManager",
        kind=Kind.REPLACE,
        hook="elora_sglang.integration.adapters.scheduler_side.EloraLoRAManager",
        why="an adapter's bytes are read once, and are the version asked for; `all` means all linear modules",
        upstream="https://github.com/sgl-project/sglang/issues/25351",
        remove_when="SGLang identifies adapters by content and takes all-linear for --lora-target-modules",
    ),
    Patch(
        name="lora_weights",
        target="sglang.srt.lora.lora.LoRAAdapter._normalize_weights",
        kind=Kind.AROUND,
        hook="elora_sglang.integration.weights.peft.normalize_weights",
        why="rsLoRA, rank_pattern and alpha_pattern are scaled wrongly; partial q/k/v or gate/up groups fail",
        upstream="https://github.com/sgl-project/sglang/blob/v0.5.23/python/sglang/srt/lora/lora.py",
        remove_when="SGLang scales by PEFT's rules and accepts adapters with any subset of q/k/v and gate/up",
    ),
)
