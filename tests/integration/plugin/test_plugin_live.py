"""Live: every hook is called by the server it was written for, and ``sglang.Engine`` takes the keyword."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import live
from support.demo_paths import Demo

from elora_sglang.patches.base import Process, When, discover, select

SCRIPT = live.ROOT / "tests" / "support" / "recording_launch.py"

#: Control requests that are refused while serving, with a body that SGLang accepts.
REFUSED: dict[str, Any] = {
    "update_weights_from_disk": {"model_path": "elsewhere"},
    "update_weights_from_distributed": {"names": [], "dtypes": [], "shapes": []},
    "update_weights_from_tensor": {"serialized_named_tensors": []},
    "update_weights_from_ipc": {"zmq_handles": {}},
    "begin_weight_update": {},
    "release_memory_occupation": {},
    "resume_memory_occupation": {},
}


@pytest.fixture(scope="module")
def hooks_called(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hooks") / "called"


@pytest.fixture(scope="module")
def server(
    demo: Demo, hooks_called: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[live.LiveServer]:
    port = live.free_port()
    arguments = [
        "--elora",
        "--model-path",
        str(demo.model),
        "--served-model-name",
        "demo",
        "--port",
        str(port),
    ]
    arguments += ["--lora-paths", *demo.lora_paths("sql")]
    log = tmp_path_factory.mktemp("log") / "server.log"
    process = live.start([sys.executable, str(SCRIPT), "serve", str(hooks_called), *arguments], log=log)
    found = live.LiveServer(process, f"http://127.0.0.1:{port}", log, tuple(arguments))
    try:
        live.wait_ready(found, 600)
        yield found
    finally:
        found.stop()


def exercise(server: live.LiveServer, demo: Demo) -> dict[str, int]:
    """One request of each kind that a hook is about; HTTP status by what was asked."""
    sampling = {"max_new_tokens": 4, "temperature": 0}
    hello = [{"role": "user", "content": "Hello"}]
    folder = demo.adapters["french"]
    tensors = {
        "lora_name": "sent",
        "config_dict": json.loads((folder / "adapter_config.json").read_text()),
        "serialized_named_tensors": [
            base64.b64encode((folder / "adapter_model.safetensors").read_bytes()).decode()
        ],
    }
    asked: dict[str, tuple[str, Any]] = {
        "generate": ("/generate", {"text": "Hello", "lora_path": "sql", "sampling_params": sampling}),
        "chat": ("/v1/chat/completions", {"model": "demo:sql", "messages": hello, "max_tokens": 4}),
        "responses": ("/v1/responses", {"model": "demo:sql", "input": "Hello", "max_output_tokens": 4}),
        "ollama chat": ("/api/chat", {"model": "sql", "messages": hello, "stream": False}),
        "ollama generate": ("/api/generate", {"model": "sql", "prompt": "Hello", "stream": False}),
        "embedding": ("/encode", {"text": "Hello"}),
        "load": ("/load_lora_adapter", {"lora_name": "legal", "lora_path": str(demo.adapters["legal"])}),
        "load tensors": ("/load_lora_adapter_from_tensors", tensors),
        "unload": ("/unload_lora_adapter", {"lora_name": "legal"}),
    }
    asked |= {f"refused: {path}": (f"/{path}", body) for path, body in REFUSED.items()}
    statuses = {name: server.post(path, body).status for name, (path, body) in asked.items()}
    statuses["state"] = server.get("/server_info").status
    return statuses


def test_every_hook_is_called_by_the_running_server(
    server: live.LiveServer, demo: Demo, hooks_called: Path
) -> None:
    statuses = exercise(server, demo)
    called = set(hooks_called.read_text().split())
    servers = {Process.MAIN, Process.TOKENIZER, Process.SCHEDULER}
    expected = {p.name for p in select(discover(), process=servers, when={When.ALWAYS, When.ELORA})}
    assert expected - called == set(), f"never called; statuses were {statuses}"
    assert [statuses[f"refused: {path}"] for path in REFUSED] == [400] * len(REFUSED), statuses
    assert statuses["generate"] == statuses["chat"] == statuses["load"] == statuses["unload"] == 200, statuses


def test_engine_takes_elora_as_a_keyword(server: live.LiveServer, demo: Demo, tmp_path: Path) -> None:
    keywords = {
        "model_path": str(demo.model),
        "elora": True,
        "elora_policy": "lru",
        "lora_paths": demo.lora_paths("sql", "french"),
        "max_total_tokens": 8192,
    }
    called = tmp_path / "called"
    status, output = live.run(
        [sys.executable, str(SCRIPT), "engine", str(called), json.dumps(keywords)],
        log=tmp_path / "engine.log",
        timeout=600,
    )
    assert status == 0, output[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    assert result["elora"]["counts"]["adapters_resident"] == 2
    base, sql, french = result["answers"]
    assert len({tuple(base), tuple(sql), tuple(french)}) == 3
    assert sql == server.generate("Hello", lora_path="sql", max_new_tokens=8)["output_ids"]
    assert "radix_cache" in called.read_text().split()
