"""Adapters' files that vanish, are cut or change while the server runs: a clear 400, others served, recovery."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import live
from support.demo_paths import Demo
from support.lifecycle_world import (
    CONFIG_FILE,
    PROMPT,
    WEIGHTS_FILE,
    answer,
    copy_adapter,
    load,
    send_tensors,
    state,
    unload,
)


@pytest.fixture(scope="module")
def server(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.LiveServer]:
    flags = ("--elora", "--dtype", "float32", "--served-model-name", "demo", "--max-running-requests", "8")
    with live.server(
        demo.model,
        *flags,
        *("--max-total-tokens", "8000", "--elora-audit-interval", "1"),
        *("--lora-paths", *demo.lora_paths("sql")),
        log_dir=tmp_path_factory.mktemp("faults"),
        boot_timeout=600,
    ) as running:
        yield running


def cut(folder: Path) -> None:
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[: len(data) - 100])


def change(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-2] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(data)


def change_scaling(folder: Path) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] + 1}))


def forget(server: live.LiveServer) -> None:
    """Empty both tiers: every adapter has its file only."""
    assert server.post("/flush_cache", {}).status == 200
    assert state(server)["resident_adapters"] == []


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "no such folder"),
        (cut, "truncated safetensors"),
        (change, "holds other content than when adapter 'broken' was loaded"),
        (change_scaling, "holds other content than when adapter 'broken' was loaded"),
    ],
)
def test_a_spoiled_file(
    server: live.LiveServer, demo: Demo, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    folder = copy_adapter(demo, "french", tmp_path / "adapter")
    assert load(server, "broken", folder).status == 200
    good, other, base = (answer(server, name) for name in ("broken", "sql", None))
    assert good != base
    spoil(folder)
    assert answer(server, "broken") == good  # still on the device
    forget(server)
    body = {"text": PROMPT, "lora_path": "broken", "sampling_params": {"max_new_tokens": 4}}
    for _ in range(2):
        reply = server.post("/generate", body)
        text = json.dumps(reply.json())
        assert reply.status == 400 and words in text and str(folder) in text
        assert answer(server, "sql") == other and answer(server, None) == base
    shutil.rmtree(folder, ignore_errors=True)
    copy_adapter(demo, "french", folder)
    assert answer(server, "broken") == good
    assert unload(server, "broken").status == 200
    assert state(server)["audit_faults"] == 0


def test_the_same_content_loaded_from_a_new_folder_is_read_from_there(
    server: live.LiveServer, demo: Demo, tmp_path: Path
) -> None:
    folder = copy_adapter(demo, "french", tmp_path / "first")
    assert load(server, "moved", folder).status == 200
    good = answer(server, "moved")
    folder = folder.rename(tmp_path / "second")
    assert load(server, "moved", folder).status == 200
    forget(server)
    assert answer(server, "moved") == good
    assert unload(server, "moved").status == 200


def test_tensors_from_a_request_outlive_a_flush(server: live.LiveServer, demo: Demo) -> None:
    assert send_tensors(server, "sent", demo.adapters["french"]).status == 200
    good = answer(server, "sent")
    for _ in range(2):
        forget(server)
        assert answer(server, "sent") == good
    assert unload(server, "sent").status == 200
    assert server.alive()
