"""Helpers of ``test_lifecycle.py``: adapter operations, streams that are watched, ways to break an adapter."""

from __future__ import annotations

import base64
import json
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from support import live
from support.demo_paths import Demo

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PROMPT = "Write a short answer about the weather, the law and the database of the town, one after the other."
POOL = 4000
#: Adapters under their own names for the whole module.
KEPT = ("sql", "french", "legal", "poetry")


def load(server: live.LiveServer, name: str, path: Path, **fields: Any) -> live.Reply:
    return server.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **fields})


def unload(server: live.LiveServer, name: str) -> live.Reply:
    return server.post("/unload_lora_adapter", {"lora_name": name})


def answer(server: live.LiveServer, name: str | None, prompt: str = PROMPT, tokens: int = 24) -> list[int]:
    return list(server.generate(prompt, lora_path=name, max_new_tokens=tokens)["output_ids"])


def cached(server: live.LiveServer, name: str | None, prompt: str = PROMPT) -> int:
    return int(server.generate(prompt, lora_path=name, max_new_tokens=1)["meta_info"]["cached_tokens"])


def state(server: live.LiveServer) -> dict[str, Any]:
    internal = server.get("/server_info").json()["internal_states"][0]
    return dict(internal["elora"])


def copy_adapter(demo: Demo, name: str, folder: Path) -> Path:
    shutil.copytree(demo.adapters[name], folder)
    return folder


class Stream:
    """A greedy ``/generate`` stream in a thread of its own; ``tokens`` grows while it runs."""

    def __init__(self, server: live.LiveServer, name: str | None, count: int, prompt: str = PROMPT) -> None:
        self.tokens: list[int] = []
        self.fault: str | None = None
        body = {
            "text": prompt,
            "lora_path": name,
            "stream": True,
            "sampling_params": {"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True},
        }
        self._request = urllib.request.Request(
            server.url + "/generate",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        self._hung_up = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self._request, timeout=300) as lines:
            for line in lines:
                if self._hung_up.is_set():
                    return
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    self.fault = self.fault or chunk.get("error", {}).get("message")
                    self.tokens = chunk.get("output_ids", self.tokens)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def wait_for(self, count: int) -> None:
        until(lambda: len(self.tokens) >= count or not self.running)
        assert self.running, f"ended after {len(self.tokens)} tokens: {self.fault}"

    def hang_up(self) -> None:
        """Close the connection in the middle of the answer."""
        self._hung_up.set()
        self._thread.join(60)
        assert not self.running

    def result(self) -> list[int]:
        self._thread.join(300)
        assert not self.running and self.fault is None
        return self.tokens


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def nothing_left(server: live.LiveServer) -> bool:
    """No adapter but the kept ones holds slots."""
    until(lambda: len(state(server)["resident_adapters"]) <= len(KEPT), 20)
    return True


def send_tensors(
    server: live.LiveServer, name: str, folder: Path, payload: bytes | None = None
) -> live.Reply:
    data = save(load_file(folder / WEIGHTS_FILE)) if payload is None else payload
    body = {
        "lora_name": name,
        "config_dict": json.loads((folder / CONFIG_FILE).read_text()),
        "serialized_named_tensors": [base64.b64encode(data).decode()],
    }
    return server.post("/load_lora_adapter_from_tensors", body)


def pressure(server: live.LiveServer) -> None:
    """Enough long base-model prompts to push everything out that may go."""
    for number in range(6):
        draw = torch.Generator().manual_seed(number)
        ids = torch.randint(10, 1000, (POOL // 3,), generator=draw).tolist()
        server.generate(input_ids=ids, max_new_tokens=1)


def edit_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / CONFIG_FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def edit_first(edit: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        name = min(tensors)
        tensors[name] = edit(tensors[name]).contiguous()
        save_file(tensors, folder / WEIGHTS_FILE)

    return change


def truncate(folder: Path) -> None:
    file = folder / WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-100])


def add_token(folder: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": 1_000_000}))


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "missing file": (lambda f: (f / WEIGHTS_FILE).unlink(), WEIGHTS_FILE, "file is missing"),
    "truncated safetensors": (truncate, WEIGHTS_FILE, "truncated safetensors"),
    "wrong shapes": (edit_first(lambda t: t[:, :-1]), WEIGHTS_FILE, "has shape"),
    "unknown target module": (
        edit_config(target_modules=["query_key_value"]),
        CONFIG_FILE,
        "query_key_value",
    ),
    "rank 0": (edit_config(r=0), CONFIG_FILE, "LoRA rank r is 0"),
    "NaN weights": (edit_first(lambda t: t * float("nan")), WEIGHTS_FILE, "NaN"),
    "DoRA": (edit_config(use_dora=True), CONFIG_FILE, "DoRA"),
    "extra vocabulary": (add_token, "added_tokens.json", "vocabulary"),
}
