"""The demo's sixteen adapters, as real PEFT folders.

Six are trained for a moment with the ``peft`` library and saved by it; the others carry seeded random weights,
scaled against the base weights so that they change what the model says. Ranks run from 4 to 64, some adapt the
attention only, one is rank-stabilised (rsLoRA), two are stored in half precision.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elora_sglang.demo import model as base_model
from elora_sglang.demo import text

BASE_NAME = "elora-demo-base"  # what adapter_config.json calls the base model: no path of the machine
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
TRAIN_STEPS, TRAIN_BATCH, TRAIN_LENGTH, TRAIN_RATE = 28, 10, 44, 8e-3
# Frobenius norm of a random adapter's delta over that of the weight it changes. Attention alone needs more.
RANDOM_STRENGTH = {ATTENTION: 0.85, ALL_LINEAR: 0.76}


@dataclass(frozen=True)
class AdapterSpec:
    """One demo adapter. ``rank`` is the LoRA rank; ``trained_on`` a style of ``demo.text`` or None: random."""

    name: str
    rank: int
    alpha: int
    modules: tuple[str, ...] = ALL_LINEAR
    trained_on: str | None = None
    rslora: bool = False
    dtype: str = "float32"


SPECS = (
    AdapterSpec("sql", 16, 32, trained_on="sql"),
    AdapterSpec("french", 8, 16, trained_on="french"),
    AdapterSpec("legal", 32, 64, trained_on="legal"),
    AdapterSpec("support", 8, 32, ATTENTION, trained_on="support"),
    AdapterSpec("code", 64, 128, trained_on="code"),
    AdapterSpec("german", 16, 8, trained_on="german", rslora=True),
    AdapterSpec("medical", 16, 32, ATTENTION, dtype="bfloat16"),
    AdapterSpec("finance", 4, 8),
    AdapterSpec("travel", 32, 32, ATTENTION),
    AdapterSpec("cooking", 8, 16),
    AdapterSpec("sports", 64, 64, ATTENTION),
    AdapterSpec("weather", 16, 16, dtype="float16"),
    AdapterSpec("poetry", 4, 16, ATTENTION),
    AdapterSpec("tutor", 32, 64),
    AdapterSpec("news", 8, 8),
    AdapterSpec("gardening", 64, 16),
)


def specs(count: int) -> list[AdapterSpec]:
    """The first ``count`` adapters; beyond sixteen, copies of the random ones under numbered names.

    Raises ValueError when ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"--adapters is {count}: ask for at least 1")
    found = list(SPECS[:count])
    random_ones = [spec for spec in SPECS if spec.trained_on is None]
    for extra in range(max(0, count - len(SPECS))):
        like = random_ones[extra % len(random_ones)]
        name = f"{like.name}-{2 + extra // len(random_ones)}"
        found.append(AdapterSpec(name, like.rank, like.alpha, like.modules, None, like.rslora, like.dtype))
    return found


def _peft_config(spec: AdapterSpec) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        target_modules=list(spec.modules),
        use_rslora=spec.rslora,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=BASE_NAME,
        inference_mode=True,
    )


def _seed(spec: AdapterSpec, seed: int) -> int:
    """A seed that depends on the adapter's name, so that adapters do not change when one is added."""
    return int.from_bytes(hashlib.sha256(f"{spec.name}-{seed}".encode()).digest()[:4], "big")


def train(spec: AdapterSpec, base: Path, tokenizer: Any, folder: Path, seed: int) -> float:
    """Train one adapter on its style with ``peft`` and let peft save it; the last loss."""
    import torch
    from peft import get_peft_model
    from transformers import LlamaForCausalLM

    assert spec.trained_on is not None, spec
    torch.manual_seed(_seed(spec, seed))
    plain = LlamaForCausalLM.from_pretrained(str(base), dtype=torch.float32, attn_implementation="eager")
    config = _peft_config(spec)
    config.inference_mode = False
    model = get_peft_model(plain, config)
    source = base_model.rows(tokenizer, text.turns(spec.trained_on, _seed(spec, seed)), TRAIN_LENGTH)
    loss = base_model.fit(model, source, steps=TRAIN_STEPS, batch=TRAIN_BATCH, peak_rate=TRAIN_RATE)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(str(folder))
    return loss


def write_random(spec: AdapterSpec, base: Path, folder: Path, seed: int) -> None:
    """Write one adapter of seeded random weights in PEFT's own layout.

    ``A [rank, in]`` and ``B [out, rank]`` are Gaussian; B is scaled so that the delta's Frobenius norm is
    ``RANDOM_STRENGTH`` of the weight's.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(_seed(spec, seed))
    scaling = spec.alpha / (math.sqrt(spec.rank) if spec.rslora else spec.rank)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(str(base / "model.safetensors"), framework="pt") as weights:
        for name in sorted(weights.keys()):
            module = name.removesuffix(".weight")
            if module.rpartition(".")[2] not in spec.modules:
                continue
            weight = weights.get_tensor(name).float()
            lora_a = torch.randn(spec.rank, weight.shape[1], generator=generator) / math.sqrt(weight.shape[1])
            lora_b = torch.randn(weight.shape[0], spec.rank, generator=generator)
            delta = scaling * torch.linalg.matrix_norm(lora_b @ lora_a)
            lora_b *= RANDOM_STRENGTH[spec.modules] * torch.linalg.matrix_norm(weight) / delta
            dtype = getattr(torch, spec.dtype)
            tensors[f"base_model.model.{module}.lora_A.weight"] = lora_a.to(dtype).contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = lora_b.to(dtype).contiguous()
    folder.mkdir(parents=True)
    _peft_config(spec).save_pretrained(str(folder))
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
