"""The demo on disk is what the tests and ``make serve`` rely on: real PEFT folders, clear choices, made once."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from support import live
from support.demo_paths import Demo
from tokenizers import Tokenizer

from elora_sglang.demo import adapters, build, check, model, text


def adapter_config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def weights(folder: Path) -> dict[str, Any]:
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as found:
        return {name: found.get_tensor(name) for name in found.keys()}  # noqa: SIM118  # not a mapping


def test_sixteen_mixed_adapters(demo: Demo) -> None:
    """Ranks 4 to 64, attention only and all linear layers, one rsLoRA, other dtypes than the pool's fp32."""
    configs = {name: adapter_config(folder) for name, folder in demo.adapters.items()}
    assert len(configs) == 16
    ranks = [config["r"] for config in configs.values()]
    assert {4, 8, 16, 32, 64} <= set(ranks)
    sizes = [len(config["target_modules"]) for config in configs.values()]
    assert sizes.count(4) >= 3
    assert sizes.count(7) >= 3
    assert sum(config["use_rslora"] for config in configs.values()) == 1
    dtypes = {str(next(iter(weights(folder).values())).dtype) for folder in demo.adapters.values()}
    assert dtypes == {"torch.float32", "torch.bfloat16", "torch.float16"}
    entries: Any = demo.manifest["adapters"]
    assert sum(entry["trained"] for entry in entries) >= 4


def test_weights_have_the_shapes_their_config_says(demo: Demo) -> None:
    for name, folder in demo.adapters.items():
        config = adapter_config(folder)
        found = weights(folder)
        assert len(found) == 2 * len(config["target_modules"]) * model.LAYERS, name
        for tensor_name, tensor in found.items():
            axis = 0 if ".lora_A." in tensor_name else 1
            assert tensor.shape[axis] == config["r"], tensor_name
            assert tensor.isfinite().all()
            assert tensor.abs().max() > 0, f"{name}: {tensor_name} is all zero"


def test_every_id_has_a_text(demo: Demo) -> None:
    tokenizer = Tokenizer.from_file(str(demo.model / "tokenizer.json"))
    config = json.loads((demo.model / "config.json").read_text())
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    special = {config["eos_token_id"], config["bos_token_id"], config["pad_token_id"], 0}
    texts = [tokenizer.decode([i]) for i in range(config["vocab_size"]) if i not in special]
    assert all(texts)
    assert not any("\ufffd" in t for t in texts)


@pytest.mark.parametrize("style", sorted(text.STYLES))
def test_text_survives_the_tokenizer(demo: Demo, style: str) -> None:
    tokenizer = Tokenizer.from_file(str(demo.model / "tokenizer.json"))
    prompt, answer = next(text.turns(style, 7))
    whole = prompt + answer + "\n  Ünïcode – «naïve», 1+1=2\t;"
    assert tokenizer.decode(tokenizer.encode(whole).ids) == whole


def test_model_folder_is_complete(demo: Demo) -> None:
    names = {path.name for path in demo.model.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert {"tokenizer_config.json", "chat_template.jinja"} <= names
    config = json.loads((demo.model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert config["max_position_embeddings"] == 8192
    assert config["num_key_value_heads"] % 2 == 0, "two tensor-parallel ranks need a KV head each"


def test_answers_differ_and_are_no_ties(demo: Demo, tmp_path: Path) -> None:
    """``python -m elora_sglang.demo.check --strict``: base and each two adapters differ on 90 % of 64 prompts."""
    assert len(set(check.prompts())) == 64
    status, output = live.run(
        [sys.executable, "-m", "elora_sglang.demo.check", str(demo.root), "--strict", "--json"],
        log=tmp_path / "check.log",
        timeout=600,
    )
    found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert status == 0, found["aims"]
    assert len(found["models"]) == 17
    base = next(row for row in found["models"] if row["name"] == "base")
    assert base["distinct_answers"] > 32, "the base model hardly looks at the prompt"


def test_a_complete_demo_is_left_alone(demo: Demo, tmp_path: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in demo.root.rglob("*") if p.is_file() and p.name != ".lock"}
    status, output = live.run(
        [sys.executable, "-m", "elora_sglang.demo", str(demo.root)], log=tmp_path / "again.log", timeout=120
    )
    assert status == 0
    assert "making" not in output
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_damage_is_noticed(demo: Demo, tmp_path: Path) -> None:
    copy = tmp_path / "demo"
    shutil.copytree(demo.root, copy)
    assert build.missing(copy, 16, 0) is None
    reason = build.missing(copy, 15, 0)
    assert reason is not None
    assert "adapter_count" in reason
    (copy / "adapters" / "sql" / "adapter_model.safetensors").write_bytes(b"short")
    assert build.missing(copy, 16, 0) == "adapters/sql/adapter_model.safetensors is missing or changed"
    (copy / "manifest.json").unlink()
    assert build.missing(copy, 16, 0) == "there is no readable manifest.json"


def test_random_adapters_are_deterministic_for_a_seed(demo: Demo, tmp_path: Path) -> None:
    spec = next(spec for spec in adapters.SPECS if spec.name == "poetry")
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        adapters.write_random(spec, demo.model, tmp_path / name, seed)
    file = "adapter_model.safetensors"
    one, two, other = ((tmp_path / name / file).read_bytes() for name in ("one", "two", "other"))
    assert one == two
    assert one != other
    assert one == (demo.adapters["poetry"] / file).read_bytes()


def test_no_path_of_this_machine_is_written(demo: Demo) -> None:
    for path in demo.root.rglob("*.json"):
        if path.name != "tokenizer.json" and "oracle" not in path.parts:
            assert str(live.ROOT) not in path.read_text(), path


def test_more_adapters_than_sixteen() -> None:
    names = [spec.name for spec in adapters.specs(40)]
    assert len(set(names)) == 40
    assert names[:16] == [spec.name for spec in adapters.SPECS]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [(["--adapters", "0"], "ask for at least 1"), ([], "is not empty and holds no demo")],
)
def test_bad_input_gets_one_line(tmp_path: Path, arguments: list[str], fault: str) -> None:
    out = tmp_path / "out"
    if not arguments:
        out.mkdir()
        (out / "letter.txt").write_text("mine")
    status, output = live.run(
        [sys.executable, "-m", "elora_sglang.demo", str(out), *arguments], log=tmp_path / "log", timeout=120
    )
    assert status == 1
    assert fault in output.splitlines()[-1]
    assert output.splitlines()[-1].startswith("elora demo: ")


def test_refuses_a_process_that_imported_sglang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sglang", object())  # type: ignore[arg-type]
    with pytest.raises(build.DemoError, match="process of its own"):
        build.build(tmp_path / "demo")
