"""Session hints against a live server, by ``curl`` and the ``openai`` client: taken, refused, and harmless."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support import live
from support.demo_paths import Demo

PROMPT = "How do I sell the blue piano at the market?"
HINTS: dict[str, Any] = {"session_id": "chat-7", "expect_return_s": 20, "mine": [1, 2]}
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.LiveServer]:
    flags = ("--elora", "--dtype", "float32", "--served-model-name", "demo", "--max-total-tokens", "8000")
    with live.server(
        demo.model,
        *flags,
        *("--lora-paths", *demo.lora_paths("sql")),
        log_dir=tmp_path_factory.mktemp("hints"),
        boot_timeout=600,
    ) as running:
        yield running


def curl(server: live.LiveServer, route: str, body: dict[str, Any]) -> tuple[int, Any]:
    """POST with the command that people use; (status, answer)."""
    tool = shutil.which("curl")
    assert tool is not None
    argv = [tool, "-s", "-w", "\n%{http_code}", "-H", "Content-Type: application/json"]
    done = subprocess.run(
        [*argv, "-d", json.dumps(body), server.url + route], capture_output=True, text=True, timeout=120
    )
    answer, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(answer)


def test_hints_change_no_answer(server: live.LiveServer) -> None:
    body = {"text": PROMPT, "lora_path": "sql", "sampling_params": GREEDY}
    status, plain = curl(server, "/generate", body)
    assert status == 200
    for given in (HINTS, {"session_end": True, "session_id": "chat-7"}, {}):
        status, hinted = curl(
            server, "/generate", {**body, "sampling_params": {**GREEDY, "custom_params": given}}
        )
        assert (status, hinted["text"]) == (200, plain["text"])
    status, hinted = curl(server, "/generate", {**body, "session_id": "chat-8"})
    assert (status, hinted["text"]) == (200, plain["text"])
    # One batch with and without, several at once: custom parameters without a custom logit processor.
    mixed = [GREEDY, {**GREEDY, "custom_params": HINTS}, {**GREEDY, "custom_params": {"session_end": True}}]
    status, answers = curl(
        server, "/generate", {"text": [PROMPT] * 3, "lora_path": "sql", "sampling_params": mixed}
    )
    assert (status, [a["text"] for a in answers]) == (200, [plain["text"]] * 3)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"session_end": "yes"}, "session_end must be true or false, got 'yes'"),
        ({"expect_return_s": -1}, "expect_return_s must be a number of seconds, 0 or more, got -1"),
        ({"session_id": ""}, "session_id must be a string of 1 to 256 characters, got ''"),
    ],
)
def test_malformed_hints_are_a_400_with_one_line(
    server: live.LiveServer, given: dict[str, Any], line: str
) -> None:
    status, answer = curl(server, "/generate", {"text": PROMPT, "sampling_params": {"custom_params": given}})
    assert (status, answer["error"]["message"]) == (400, line)
    status, answer = curl(
        server, "/v1/completions", {"model": "demo", "prompt": PROMPT, "custom_params": given}
    )
    assert status == 400 and line in json.dumps(answer)


def test_openai_client(server: live.LiveServer) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": PROMPT}]
    common: dict[str, Any] = {"model": "sql", "messages": messages, "max_tokens": 8, "temperature": 0}
    plain = client.chat.completions.create(**common).choices[0].message.content
    hinted = client.chat.completions.create(**common, extra_body={"custom_params": HINTS})
    assert hinted.choices[0].message.content == plain
    stream = client.chat.completions.create(
        **common, stream=True, extra_body={"custom_params": {"session_end": True}}
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == plain
    with pytest.raises(openai.BadRequestError, match="session_end must be true or false"):
        client.chat.completions.create(**common, extra_body={"custom_params": {"session_end": 3}})
    assert (
        client.completions.create(
            model="sql", prompt=PROMPT, max_tokens=8, extra_body={"custom_params": HINTS}
        )
        .choices[0]
        .text
    )
