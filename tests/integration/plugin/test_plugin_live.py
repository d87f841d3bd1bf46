"""Live: a server is driven through the life it is for, and every hook and every override is reached."""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sglang.srt.managers.scheduler  # noqa: F401  SGLang's modules import each other; this order works
from support import live
from support.demo_paths import Demo

from elora_sglang.integration.adapters import tokenizer
from elora_sglang.integration.plugin import counter
from elora_sglang.integration.scheduler import scheduler
from elora_sglang.patches.base import Kind, discover, overrides, serving

ENGINE = live.ROOT / "tests" / "support" / "engine_launch.py"

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

#: What these servers cannot reach, and why.
NOT_REACHED: dict[str, str] = {
    "lora_registry.register": "only stock's load calls it, and the tokenizer manager has its own",
    "lora_registry.unregister": "only stock's unload calls it, and the tokenizer manager has its own",
    "lora_registry.wait_for_unload": "only stock's unload calls it, and the tokenizer manager has its own",
    "prefill_adder.preempt_to_schedule": "needs a server with --enable-priority-scheduling",
    "radix_cache.__init__": "the cache is made before its class is counted; the record radix_cache is counted",
    "request_receiver.__init__": "the receiver is made before its class is counted",
    "radix_cache.pretty_print": "SGLang prints a tree only where somebody debugs it",
    "radix_cache.root_node_handle": "SGLang asks for it where it throws a match away (SGLANG_RADIX_FORCE_MISS)",
    "radix_cache.total_size": "SGLang reads it only where a stock tree prints itself",
}


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("calls") / "calls"


@pytest.fixture(scope="module")
def server(demo: Demo, calls: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.LiveServer]:
    flags = ("--elora", "--served-model-name", "demo", "--lora-paths", *demo.lora_paths("sql"))
    flags += ("--max-total-tokens", "3000", "--max-running-requests", "2")
    # What left the device is fetched when its request is admitted, not before.
    flags += ("--elora-without", "queue-prefetch,idle-prefetch")
    env = live.clean_env(**{counter.ENV_CALLS: str(calls)})
    with live.server(demo.model, *flags, log_dir=tmp_path_factory.mktemp("log"), env=env) as found:
        yield found


def expected() -> set[str]:
    """Every hook of a server with ``--elora``, and every member that one of our classes overrides."""
    names: set[str] = set()
    classes = {**scheduler.WATCHED, **tokenizer.WATCHED}
    for patch in serving(discover()):
        hook = patch.load_hook()
        if patch.kind is Kind.REPLACE:
            classes[patch.name] = hook
        else:
            names.add(patch.name)
    return names | {f"{name}.{member}" for name, ours in classes.items() for member in overrides(ours)}


def live_a_life(server: live.LiveServer, demo: Demo) -> dict[str, int]:
    """One request of each kind that a hook is about; HTTP status by what was asked."""
    sampling = {"max_new_tokens": 4, "temperature": 0}
    hello = [{"role": "user", "content": "Hello"}]
    french = demo.adapters["french"]
    tensors = {
        "lora_name": "sent",
        "config_dict": json.loads((french / "adapter_config.json").read_text()),
        "serialized_named_tensors": [
            base64.b64encode((french / "adapter_model.safetensors").read_bytes()).decode()
        ],
    }

    def folder(name: str, **more: Any) -> tuple[str, Any]:
        return "/load_lora_adapter", {"lora_name": name, "lora_path": str(demo.adapters["legal"]), **more}

    def generate(**fields: Any) -> tuple[str, Any]:
        return "/generate", {"text": "Hello " * 40, "sampling_params": sampling, **fields}

    asked: dict[str, tuple[str, Any]] = {
        "generate": generate(lora_path="sql"),
        "generate again": generate(lora_path="sql"),
        "generate on the base": generate(),
        "generate for two": generate(text=["Hello", "Good day"], lora_path=["sql", None]),
        "two names for one prompt": generate(lora_path=["sql", "sql"]),
        "malformed hint": generate(sampling_params={**sampling, "custom_params": {"session_end": "yes"}}),
        "chat": ("/v1/chat/completions", {"model": "demo:sql", "messages": hello, "max_tokens": 4}),
        "unknown name": ("/v1/chat/completions", {"model": "nobody", "messages": hello, "max_tokens": 4}),
        "responses": ("/v1/responses", {"model": "demo:sql", "input": "Hello", "max_output_tokens": 4}),
        "ollama chat": ("/api/chat", {"model": "sql", "messages": hello, "stream": False}),
        "ollama generate": ("/api/generate", {"model": "sql", "prompt": "Hello", "stream": False}),
        "load": folder("legal"),
        "load tensors": ("/load_lora_adapter_from_tensors", tensors),
        "use tensors": generate(lora_path="sent"),
        "replace": ("/load_lora_adapter", {"lora_name": "legal", "lora_path": str(french), "pinned": True}),
        "use pinned": generate(lora_path="legal"),
        "unload": ("/unload_lora_adapter", {"lora_name": "legal"}),
        **{
            f"prompt {turn}": generate(text=None, input_ids=[10 + turn % 4] * 900)  # more than the pool holds
            for turn in range(6)
        },
    }
    asked |= {f"refused: {path}": (f"/{path}", body) for path, body in REFUSED.items()}
    statuses = {name: server.post(path, body).status for name, (path, body) in asked.items()}
    abort_a_waiting_request(server)
    statuses["flush"] = server.post("/flush_cache", {}).status
    statuses["state"] = server.get("/server_info").status
    return statuses


def abort_a_waiting_request(server: live.LiveServer) -> None:
    """Two requests run, which is all that may; the third one waits, and is aborted."""
    long = {"text": "Hello", "sampling_params": {"max_new_tokens": 1300, "ignore_eos": True}}
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(server.post, "/generate", {**long, "rid": f"runs{i}"}) for i in range(2)]
        time.sleep(0.5)
        waiting = pool.submit(server.post, "/generate", {**long, "rid": "waits"})
        time.sleep(0.5)
        server.post("/abort_request", {"rid": "waits"})
        waiting.result(60)
        assert not any(answer.done() for answer in running), "nobody had to wait"
        server.post("/abort_request", {"abort_all": True})


def engine(demo: Demo, folder: Path, calls: Path) -> dict[str, Any]:
    """What an ``Engine`` in another process answers for the base model and two adapters."""
    keywords = {
        "model_path": str(demo.model),
        "elora": True,
        "elora_policy": "lru",
        "lora_paths": demo.lora_paths("sql", "french"),
        "max_total_tokens": 8192,
    }
    env = live.clean_env(**{counter.ENV_CALLS: str(calls)})
    command = [sys.executable, str(ENGINE), json.dumps(keywords)]
    status, output = live.run(command, log=folder / "engine.log", timeout=600, env=env)
    assert status == 0, output[-3000:]
    (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def test_every_hook_and_every_override_is_reached(
    server: live.LiveServer, demo: Demo, calls: Path, tmp_path: Path
) -> None:
    statuses = live_a_life(server, demo)
    refused = {"two names for one prompt", "malformed hint", "responses", "ollama chat", "ollama generate"}
    refused |= {f"refused: {path}" for path in REFUSED}
    assert {name for name, status in statuses.items() if status == 400} == refused, statuses
    assert {name for name, status in statuses.items() if status == 404} == {"unknown name"}, statuses
    assert set(statuses.values()) == {200, 400, 404}, statuses

    result = engine(demo, tmp_path, calls)
    assert result["elora"]["counts"]["adapters_resident"] == 2
    base, sql, french = result["answers"]
    assert len({tuple(base), tuple(sql), tuple(french)}) == 3
    assert sql == server.generate("Hello", lora_path="sql", max_new_tokens=8)["output_ids"]

    reached = counter.read(calls)
    missing = expected() - set(reached)
    assert missing == set(NOT_REACHED), (
        f"never called: {sorted(missing - set(NOT_REACHED))}; called after all: {sorted(set(NOT_REACHED) - missing)}"
    )
    assert reached["scheduler._process_hicache_events"] > 10
    assert reached["scheduler.load_lora_adapter"] >= 2, "one load and one replacement"


def test_counting_is_off_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(counter.ENV_CALLS, raising=False)
    for patch in discover():
        assert counter.counted(patch) is patch.load_hook()
    counter.count("engine_arguments")
    assert not any(counter._WATCHED in vars(ours) for ours in scheduler.WATCHED.values())
