"""Clients as people have them, unmodified, talk to adapters: ``openai``, ``curl``, SGLang's own benchmark."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from support import live
from support.demo_paths import Demo

QUESTION = "How do I sell the blue piano at the market?"
CHAT: list[Any] = [{"role": "user", "content": QUESTION}]
GREEDY: dict[str, Any] = {"max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def server(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.LiveServer]:
    flags = ("--elora", "--dtype", "float32", "--served-model-name", "demo", "--max-running-requests", "8")
    names = ("sql", "french", "legal", "finance", "poetry")
    with live.server(
        demo.model,
        *flags,
        *("--max-total-tokens", "8000", "--stream-interval", "1", "--lora-paths", *demo.lora_paths(*names)),
        log_dir=tmp_path_factory.mktemp("clients"),
        boot_timeout=600,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: live.LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def prompt(demo: Demo) -> str:
    """What the demo's chat template makes of the question."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.model)
    return str(tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True))


@pytest.fixture(scope="module")
def expected(server: live.LiveServer, prompt: str) -> dict[str, str]:
    """Answers of the native API; all different, so that a mix-up shows."""
    said = {
        name: str(
            server.generate(
                prompt,
                lora_path=None if name == "demo" else name,
                max_new_tokens=24,
                sampling={"ignore_eos": False},
            )["text"]
        )
        for name in ("demo", "sql", "french", "legal")
    }
    assert len(set(said.values())) == len(said)
    return said


@pytest.mark.parametrize(
    "model",
    ["demo", "demo:sql", "sql", "demo:french", "french", "default:legal"],
    ids=lambda m: m.replace(":", "-"),
)
def test_openai_client(client: openai.OpenAI, expected: dict[str, str], prompt: str, model: str) -> None:
    said = expected[model.rsplit(":", 1)[-1]]
    chat = client.chat.completions.create(model=model, messages=CHAT, **GREEDY)
    assert chat.choices[0].message.content == said
    text = client.completions.create(model=model, prompt=prompt, **GREEDY)
    assert text.choices[0].text == said
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(model=model, messages=CHAT, stream=True, **GREEDY)
        if chunk.choices
    ]
    assert len(pieces) > 2
    assert "".join(pieces) == said
    stream = client.completions.create(model=model, prompt=prompt, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == said


def test_openai_client_prompts_in_one_request(
    client: openai.OpenAI, expected: dict[str, str], prompt: str
) -> None:
    reply = client.completions.create(model="demo:sql", prompt=[prompt, prompt], **GREEDY)
    assert [choice.text for choice in reply.choices] == [expected["sql"]] * 2


def test_openai_client_sees_the_adapters(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {
        "demo",
        "sql",
        "french",
        "legal",
        "finance",
        "poetry",
    }


@pytest.mark.parametrize("model", ["demo:sqll", "sqll"])
def test_openai_client_unknown_adapter(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError, match=r"nearest loaded.*sql"):
        client.chat.completions.create(model=model, messages=CHAT, **GREEDY)


def curl(server: live.LiveServer, path: str, payload: Any) -> tuple[int, Any]:
    """Status and body of a POST by ``curl``."""
    done = subprocess.run(
        [
            *("curl", "-sS", "--noproxy", "*", "-w", "\n%{http_code}", f"{server.url}{path}"),
            *("-H", "Content-Type: application/json", "-d", json.dumps(payload)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)


def test_curl(server: live.LiveServer, demo: Demo, expected: dict[str, str], prompt: str) -> None:
    assert shutil.which("curl"), "install curl"
    sampling = {"max_new_tokens": 24, "temperature": 0}
    status, body = curl(
        server, "/generate", {"text": prompt, "lora_path": "sql", "sampling_params": sampling}
    )
    assert (status, body["text"]) == (200, expected["sql"])
    status, body = curl(server, "/v1/chat/completions", {"model": "demo:legal", "messages": CHAT, **GREEDY})
    assert (status, body["choices"][0]["message"]["content"]) == (200, expected["legal"])
    status, body = curl(
        server, "/load_lora_adapter", {"lora_name": "new", "lora_path": str(demo.adapters["sql"])}
    )
    assert (status, body["success"]) == (200, True)
    status, body = curl(server, "/v1/completions", {"model": "demo:new", "prompt": prompt, **GREEDY})
    assert (status, body["choices"][0]["text"]) == (200, expected["sql"])
    assert curl(server, "/unload_lora_adapter", {"lora_name": "new"})[0] == 200
    status, body = curl(
        server, "/generate", {"text": prompt, "lora_path": "new", "sampling_params": sampling}
    )
    assert status == 404
    assert "new" in json.dumps(body)


@pytest.mark.parametrize("backend", ["sglang", "sglang-oai-chat"])
def test_sglang_benchmark(server: live.LiveServer, demo: Demo, tmp_path: Path, backend: str) -> None:
    """It sends the bare name as ``model`` and as ``lora_path``; its adapters are the ones that are loaded."""
    server.post("/flush_cache")
    before = counters(server)["adapter_loads"]
    report = tmp_path / "report.jsonl"
    status, output = live.run(
        [
            *(sys.executable, "-m", "sglang.benchmark.serving", "--backend", backend),
            *("--base-url", server.url, "--model", str(demo.model), "--served-model-name", "demo"),
            *("--dataset-name", "random-ids", "--random-input-len", "16", "--random-output-len", "4"),
            *("--random-range-ratio", "1", "--num-prompts", "6", "--seed", "1", "--warmup-requests", "1"),
            *("--lora-name", "finance", "poetry", "--lora-request-distribution", "distinct"),
            *("--output-file", str(report)),
        ],
        log=tmp_path / "bench.log",
        timeout=400,
    )
    assert status == 0, output[-4000:]
    result = json.loads(report.read_text().splitlines()[-1])
    assert result["completed"] == 6, output[-4000:]
    assert result["total_output_tokens"] == 6 * 4
    assert counters(server)["adapter_loads"] == before + 2


def counters(server: live.LiveServer) -> dict[str, Any]:
    """What ELORA has done since start, in ``/server_info``."""
    return dict(server.get("/server_info").json()["internal_states"][0]["elora"]["done"])
