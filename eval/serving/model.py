"""The model that live comparisons run on: big enough that recomputing a prompt costs something on a CPU.

6 layers, hidden size 384, 6 heads over 2 KV heads: seeded random weights in fp32, 6,144 bytes of KV a token; adapters
on all linear layers, seeded random PEFT folders. ``python -m elora_sglang.eval.serving.model FOLDER COUNT RANKS``
writes them once, in a process that has not imported SGLang. LoRA ranks are mixed by default, 8 to 64, as tenants bring
them; ``--ranks 32`` makes all equal, which is the best case of padded slot buffers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 6, 384, 6, 2, 64, 1056
KV_BYTES_PER_TOKEN = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
RANKS = (32, 16, 64, 32, 8, 64, 16, 32)  # by adapter, again and again
FORMAT = 3


def adapter_bytes(rank: int) -> int:
    """Bytes of one adapter's weights in fp32: A ``[rank, in]`` and B ``[out, rank]`` of every linear layer."""
    kv = KV_HEADS * HEAD_DIM
    widths = 2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + kv) + 3 * (HIDDEN + FFN)
    return LAYERS * rank * widths * 4


def name(index: int) -> str:
    """Name of adapter ``index``."""
    return f"tenant-{index:03d}"


def rank(index: int, ranks: Sequence[int] = RANKS) -> int:
    """LoRA rank of adapter ``index``."""
    return ranks[index % len(ranks)]


def complete(folder: Path, adapters: int, ranks: Sequence[int] = RANKS) -> bool:
    """Whether ``folder`` holds the model and at least so many adapters of these LoRA ranks."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return False
    same = manifest.get("format") == FORMAT and manifest.get("ranks") == list(ranks)
    return same and manifest.get("adapters", 0) >= adapters


def build(folder: Path, adapters: int, ranks: Sequence[int] = RANKS, seed: int = 0) -> None:
    """Write model, tokenizer and adapters; the manifest last."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    from elora_sglang.demo import tokenizer
    from elora_sglang.demo.adapters import ALL_LINEAR

    logging.set_verbosity_error()
    folder.mkdir(parents=True, exist_ok=True)
    words = tokenizer.train(seed)
    tokenizer.save(words, folder / "base")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        dtype="float32",
        initializer_range=0.05,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(str(folder / "base"), safe_serialization=True)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for index in range(adapters):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        tensors, low = {}, rank(index, ranks)
        for key in sorted(shapes):
            module = key.removesuffix(".weight")
            if module.rpartition(".")[2] not in ALL_LINEAR:
                continue
            out, into = shapes[key]
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(low, into, generator=generator) / into**0.5
            tensors[f"{prefix}.lora_B.weight"] = 0.02 * torch.randn(out, low, generator=generator)
        target = folder / "adapters" / name(index)
        target.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(target / "adapter_model.safetensors"), metadata={"format": "pt"})
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "elora-eval-base",
            "r": low,
            "lora_alpha": 2 * low,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "target_modules": list(ALL_LINEAR),
        }
        (target / "adapter_config.json").write_text(json.dumps(settings))
    manifest = {"format": FORMAT, "adapters": adapters, "ranks": list(ranks), "seed": seed}
    (folder / "manifest.json").write_text(json.dumps(manifest))


if __name__ == "__main__":
    build(Path(sys.argv[1]), int(sys.argv[2]), [int(part) for part in sys.argv[3].split(",")])
