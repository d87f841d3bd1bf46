"""Good PEFT adapter folders for a tiny base model, and ways to change them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from elora_sglang.runtime.adapters.check import BaseModelShape

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, VOCABULARY = 32, 48, 4, 2, 2, 100
CONFIG = SimpleNamespace(
    model_type="llama",
    hidden_size=HIDDEN,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    vocab_size=VOCABULARY,
)
BASE = BaseModelShape.from_config(CONFIG)
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B = Q_A.replace("lora_A", "lora_B")


def write_adapter(folder: Path, *, lora_rank: int = 4, modules: tuple[str, ...] = (), seed: int = 0) -> Path:
    """A good PEFT folder; ``modules`` empty means all of the base model's."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for path, (n_in, n_out) in BASE.linear.items():
        if modules and path.rsplit(".", 1)[1] not in modules:
            continue
        for layer in range(LAYERS):
            stem = f"base_model.model.model.layers.{layer}.{path}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(lora_rank, n_in, generator=draw)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(n_out, lora_rank, generator=draw)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": lora_rank,
        "lora_alpha": 2 * lora_rank,
        "target_modules": list(modules) or BASE.modules,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "use_dora": False,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


def set_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / CONFIG_FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def change_tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS_FILE)

    return change


def poison(value: float) -> Callable[[Path], None]:
    return change_tensors(lambda t: t[Q_A].view(-1)[5].fill_(value))
