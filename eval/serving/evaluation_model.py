"""The model that live comparisons run on: big enough that recomputing a prompt costs something on a CPU.

6 layers, hidden size 384, 6 heads over 2 KV heads: seeded random weights in fp32, 6,144 bytes of KV a token; adapters
on all linear layers, seeded random PEFT folders. ``python -m elora_sglang.eval.serving.evaluation_model FOLDER COUNT
RANKS`` writes them once, in a process that has not imported SGLang. LoRA ranks are mixed by default, 8 to 64, as
tenants bring them; ``--ranks 32`` makes all equal, which is the best case of padded slot buffers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 6, 384, 6, 2, 64, 1056
KV_BYTES_PER_TOKEN = LAYERS * 2 * KV_HEADS * HEAD_DIM * 4
RANKS = (32, 16, 64, 32, 8, 64, 16, 32)  # by adapter, again and again
FORMAT = 4


def adapter_bytes(rank: int) -> int:
    """Bytes of one adapter's weights in fp32: A ``[rank, in]`` and B ``[out, rank]`` of every linear layer."""
    kv = KV_HEADS * HEAD_DIM
    widths = 2 * (HIDDEN + HIDDEN) + 2 * (HIDDEN + kv) + 3 * (HIDDEN + FFN)
    return LAYERS * rank * widths * 4


def names(count: int) -> list[str]:
    """Names of the adapters, by index."""
    return [f"tenant-{index:03d}" for index in range(count)]


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
    """Write model, tokenizer and adapters, in place of those that are there; the manifest last."""
    import shutil

    import torch
    from transformers import LlamaForCausalLM, logging

    from elora_sglang.demo import model, tokenizer
    from elora_sglang.demo.adapters import AdapterSpec, write_random

    logging.set_verbosity_error()
    base = folder / "base"
    words = tokenizer.train(seed)
    tokenizer.save(words, base)
    torch.manual_seed(seed)
    config = model.config(words)
    config.update({
        "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_position_embeddings": 16384,
        "initializer_range": 0.05,
    })  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(base), safe_serialization=True)
    for index, name in enumerate(names(adapters)):
        low, target = rank(index, ranks), folder / "adapters" / name
        shutil.rmtree(target, ignore_errors=True)
        write_random(AdapterSpec(name, low, 2 * low), base, target, seed)
    manifest = {"format": FORMAT, "adapters": adapters, "ranks": list(ranks), "seed": seed}
    (folder / "manifest.json").write_text(json.dumps(manifest))


if __name__ == "__main__":
    build(Path(sys.argv[1]), int(sys.argv[2]), [int(part) for part in sys.argv[3].split(",")])
