"""Every fault of an adapter is refused with file and fault; the good adapter they are made from passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapter_folders import (
    BASE,
    CONFIG,
    CONFIG_FILE,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    Q_A,
    Q_B,
    VOCABULARY,
    WEIGHTS_FILE,
    change_tensors,
    poison,
    set_config,
    write_adapter,
)

from elora_sglang.runtime.adapters.check import BaseModelShape, check
from elora_sglang.runtime.adapters.files import AdapterError, read_folder


def change_bytes(edit: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / WEIGHTS_FILE
        file.write_bytes(edit(bytearray(file.read_bytes())))

    return change


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS_FILE), folder / "adapter_model.bin")
    (folder / WEIGHTS_FILE).unlink()


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rename(old: str, new: str) -> Callable[[Path], None]:
    return change_tensors(lambda t: t.update({name.replace(old, new): t.pop(name) for name in list(t)}))


def added_token(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": VOCABULARY}))


def bad_length(data: bytearray) -> bytearray:
    data[:8] = (1 << 60).to_bytes(8, "little")
    return data


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "missing config": (without(CONFIG_FILE), CONFIG_FILE, "file is missing"),
    "missing weights": (without(WEIGHTS_FILE), WEIGHTS_FILE, "file is missing"),
    "pickle only": (only_pickle, "adapter_model.bin", "pickle"),
    "bad json": (lambda f: (f / CONFIG_FILE).write_text('{"r": 4,'), CONFIG_FILE, "not valid JSON"),
    "json list": (lambda f: (f / CONFIG_FILE).write_text("[1]"), CONFIG_FILE, "not a JSON object"),
    "binary json": (lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00"), CONFIG_FILE, "not valid JSON"),
    "empty weights": (change_bytes(lambda d: b""), WEIGHTS_FILE, "truncated safetensors"),
    "truncated header": (change_bytes(lambda d: d[:40]), WEIGHTS_FILE, "truncated safetensors"),
    "truncated data": (change_bytes(lambda d: d[:-7]), WEIGHTS_FILE, "truncated safetensors"),
    "trailing bytes": (change_bytes(lambda d: d + b"\0" * 16), WEIGHTS_FILE, "belong to no tensor"),
    "absurd header length": (change_bytes(bad_length), WEIGHTS_FILE, "not a safetensors file"),
    "header not json": (change_bytes(lambda d: d[:8] + b"!" + d[9:]), WEIGHTS_FILE, "invalid JSON in header"),
    "integer weights": (
        change_tensors(lambda t: t.update({Q_A: t[Q_A].to(torch.int8)})),
        WEIGHTS_FILE,
        "dtype I8",
    ),
    "wrong A shape": (
        change_tensors(lambda t: t.update({Q_A: torch.zeros(4, HIDDEN + 1)})),
        WEIGHTS_FILE,
        Q_A,
    ),
    "wrong B shape": (
        change_tensors(lambda t: t.update({Q_B: torch.zeros(HIDDEN - 1, 4)})),
        WEIGHTS_FILE,
        Q_B,
    ),
    "rank differs from config": (set_config(r=8), WEIGHTS_FILE, "LoRA rank 8"),
    "A and B ranks differ": (
        change_tensors(lambda t: t.update({Q_A: torch.zeros(3, HIDDEN)})),
        WEIGHTS_FILE,
        Q_A,
    ),
    "A without B": (change_tensors(lambda t: t.pop(Q_B)), WEIGHTS_FILE, "no lora_B"),
    "unknown target module": (
        set_config(target_modules=["q_proj", "query_key_value"]),
        CONFIG_FILE,
        "query_key_value",
    ),
    "no target modules": (set_config(target_modules=None), CONFIG_FILE, "target_modules is None"),
    "unknown tensor": (rename("self_attn.q_proj", "attention.wq"), WEIGHTS_FILE, "matches no module"),
    "tensor outside layers": (rename("model.layers.0", "model.tower.0"), WEIGHTS_FILE, "matches no module"),
    "layer too high": (rename("layers.1.", "layers.7."), WEIGHTS_FILE, "layer 7"),
    "declared but absent": (
        change_tensors(lambda t: [t.pop(name) for name in list(t) if "o_proj" in name]),
        CONFIG_FILE,
        "o_proj",
    ),
    "present but undeclared": (set_config(target_modules=["q_proj"]), WEIGHTS_FILE, "down_proj"),
    "no tensors": (change_tensors(lambda t: t.clear()), WEIGHTS_FILE, "no tensors"),
    "rank 0": (set_config(r=0), CONFIG_FILE, "LoRA rank r is 0"),
    "rank missing": (set_config(r=None), CONFIG_FILE, "LoRA rank r is None"),
    "rank true": (set_config(r=True), CONFIG_FILE, "LoRA rank r is True"),
    "rank pattern 0": (set_config(rank_pattern={"q_proj": 0}), CONFIG_FILE, "rank_pattern['q_proj'] is 0"),
    "alpha missing": (set_config(lora_alpha=None), CONFIG_FILE, "lora_alpha is None"),
    "alpha text": (set_config(alpha_pattern={"q_proj": "x"}), CONFIG_FILE, "alpha_pattern"),
    "NaN": (poison(float("nan")), WEIGHTS_FILE, "NaN or infinite"),
    "infinity": (poison(float("-inf")), WEIGHTS_FILE, "NaN or infinite"),
    "DoRA config": (set_config(use_dora=True), CONFIG_FILE, "DoRA"),
    "DoRA tensor": (
        change_tensors(
            lambda t: t.update({Q_A.replace("lora_A", "lora_magnitude_vector"): torch.ones(HIDDEN)})
        ),
        WEIGHTS_FILE,
        "DoRA",
    ),
    "extra vocabulary": (added_token, "added_tokens.json", "beyond the base vocabulary"),
    "embedding target": (set_config(target_modules=["q_proj", "embed_tokens"]), CONFIG_FILE, "embed_tokens"),
    "embedding tensor": (
        change_tensors(
            lambda t: t.update(
                {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, VOCABULARY)}
            )
        ),
        WEIGHTS_FILE,
        "vocabulary",
    ),
    "lm_head tensor": (
        change_tensors(
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, HIDDEN)})
        ),
        WEIGHTS_FILE,
        "vocabulary",
    ),
    "other peft type": (set_config(peft_type="IA3"), CONFIG_FILE, "peft_type is 'IA3'"),
    "modules_to_save": (set_config(modules_to_save=["lm_head"]), CONFIG_FILE, "modules_to_save"),
    "bias": (set_config(bias="lora_only"), CONFIG_FILE, "bias is 'lora_only'"),
    "lora_bias": (set_config(lora_bias=True), CONFIG_FILE, "lora_bias"),
    "fan_in_fan_out": (set_config(fan_in_fan_out=True), CONFIG_FILE, "fan_in_fan_out"),
    "layer replication": (set_config(layer_replication=[[0, 2]]), CONFIG_FILE, "layer_replication"),
    "token indices": (set_config(trainable_token_indices=[1]), CONFIG_FILE, "trainable_token_indices"),
    "activated LoRA": (set_config(alora_invocation_tokens=[1]), CONFIG_FILE, "activated LoRA"),
    "PiSSA": (set_config(init_lora_weights="pissa_niter_4"), CONFIG_FILE, "changed base model"),
}


def accept(folder: Path, **limits: Any) -> Any:
    return check(read_folder(folder), BASE, **limits)


def test_the_good_adapter_passes(tmp_path: Path) -> None:
    checked = accept(write_adapter(tmp_path), dtype=torch.float16)
    assert checked.config["target_modules"] == BASE.modules
    assert len(checked.tensors) == 2 * len(BASE.linear) * LAYERS


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_names_its_file_and_itself(fault: str, tmp_path: Path) -> None:
    breaks, file, words = FAULTS[fault]
    folder = write_adapter(tmp_path / "adapter")
    breaks(folder)
    with pytest.raises(AdapterError) as caught:
        accept(folder)
    message = str(caught.value)
    assert message.startswith(f"Adapter refused: {folder / file}: ") and words in message
    assert "\n" not in message and len(caught.value.advice) > 5
    assert caught.value.status_code == 400


def test_missing_folder_and_file_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        read_folder(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterError, match="is not a folder"):
        read_folder(tmp_path / "file")


def test_server_limits(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, lora_rank=8)
    with pytest.raises(
        AdapterError, match=r"adapts down_proj, .*, which --lora-target-modules does not list"
    ):
        accept(folder, target_modules={"qkv_proj", "o_proj"})
    accept(folder, target_modules={"qkv_proj", "o_proj", "gate_up_proj", "down_proj"})
    accept(folder, target_modules={"all"})


def test_a_value_that_overflows_in_the_serving_dtype(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    change_tensors(lambda t: t[Q_A].view(-1)[3].fill_(1e6))(folder)
    accept(folder, dtype=torch.bfloat16)
    with pytest.raises(AdapterError, match=r"overflows in the serving dtype torch\.float16"):
        accept(folder, dtype=torch.float16)


def test_rank_pattern_is_per_module(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, modules=("q_proj", "v_proj"))

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(LAYERS):
            a, b = (name.replace("layers.0", f"layers.{layer}") for name in (Q_A, Q_B))
            tensors.update({a: torch.zeros(6, HIDDEN), b: torch.zeros(HIDDEN, 6)})

    change_tensors(widen)(folder)
    with pytest.raises(AdapterError, match="LoRA rank 4 need"):
        accept(folder)
    set_config(rank_pattern={"q_proj": 6})(folder)
    accept(folder)


@pytest.mark.parametrize("modules", [("q_proj",), ("k_proj",), ("q_proj", "v_proj"), ("up_proj",)])
def test_partial_fused_groups_are_accepted(modules: tuple[str, ...], tmp_path: Path) -> None:
    assert accept(write_adapter(tmp_path, modules=modules)).config["target_modules"] == sorted(modules)


def test_a_pattern_string_becomes_the_list_of_modules(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, modules=("q_proj", "v_proj"))
    set_config(target_modules=r".*\.(q|v)_proj")(folder)
    assert accept(folder).config["target_modules"] == ["q_proj", "v_proj"]


def test_phi3_names() -> None:
    base = BaseModelShape.from_config(SimpleNamespace(**{**vars(CONFIG), "model_type": "phi3"}))
    assert base.linear["self_attn.qkv_proj"] == (HIDDEN, HIDDEN + 2 * (HIDDEN // HEADS) * KV_HEADS)
    assert base.linear["mlp.gate_up_proj"] == (HIDDEN, 2 * INNER)
