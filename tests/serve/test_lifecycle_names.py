"""How requests name adapters, over every API of a live server: docs/adapters.md, row by row."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import live
from support.demo_paths import Demo

NAMES = ("sql", "french", "legal", "poetry", "news", "tutor")
SERVED = "base"
PROMPT = "Tell me about the town and its weather."
FLAGS = ("--elora", "--dtype", "float32", "--max-running-requests", "8", "--max-total-tokens", "4000")


@pytest.fixture(scope="module")
def server(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.LiveServer]:
    flags = (*FLAGS, "--served-model-name", SERVED, "--lora-paths", *demo.lora_paths(*NAMES))
    with live.server(demo.model, *flags, log_dir=tmp_path_factory.mktemp("names")) as running:
        yield running


def body(model: Any = ..., lora_path: Any = ..., **fields: Any) -> dict[str, Any]:
    named = {"model": model, "lora_path": lora_path}
    return {
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        **{key: value for key, value in named.items() if value is not ...},
        **fields,
    }


def complete(server: live.LiveServer, prompt: Any = PROMPT, **fields: Any) -> live.Reply:
    return server.post("/v1/completions", body(prompt=prompt, **fields))


def chat(server: live.LiveServer, **fields: Any) -> live.Reply:
    return server.post("/v1/chat/completions", body(messages=[{"role": "user", "content": PROMPT}], **fields))


def text(reply: live.Reply) -> str:
    assert reply.status == 200, reply.text
    choice = reply.json()["choices"][0]
    return str(choice["text"] if "text" in choice else choice["message"]["content"])


def native(server: live.LiveServer, name: str | None) -> str:
    return str(server.generate(PROMPT, lora_path=name, max_new_tokens=12)["text"])


def test_every_spelling_gets_its_adapter(server: live.LiveServer) -> None:
    expected = {name: native(server, name) for name in (None, *NAMES)}
    assert len(set(expected.values())) == len(expected), "the demo's answers must differ to show anything"
    for name in NAMES:
        for fields in (
            {"model": SERVED, "lora_path": name},
            {"model": f"{SERVED}:{name}"},
            {"model": f"default:{name}"},
            {"model": name},
            {"model": name, "lora_path": name},  # what SGLang's benchmark client sends
            {"lora_path": name},
        ):
            assert text(complete(server, **fields)) == expected[name], fields
    for fields in ({"model": SERVED}, {"model": "default"}, {}, {"model": SERVED, "lora_path": None}):
        assert text(complete(server, **fields)) == expected[None], fields


def test_chat_follows_the_same_rule(server: live.LiveServer) -> None:
    by_path = {name: text(chat(server, model=SERVED, lora_path=name)) for name in (None, "sql", "french")}
    assert len(set(by_path.values())) == 3
    for name in ("sql", "french"):
        assert text(chat(server, model=name)) == by_path[name] == text(chat(server, model=f"{SERVED}:{name}"))
    assert text(chat(server, model=SERVED)) == by_path[None]


def test_one_adapter_per_prompt(server: live.LiveServer) -> None:
    rows = ["sql", None, "french"]
    out = server.generate([PROMPT] * 3, lora_path=rows, max_new_tokens=12)
    assert [o["text"] for o in out] == [native(server, name) for name in rows]
    reply = server.post("/v1/completions", body(model=SERVED, prompt=[PROMPT] * 3, lora_path=rows))
    assert [c["text"] for c in reply.json()["choices"]] == [o["text"] for o in out]


WRONG = [
    ({"model": "sqll"}, 404, "Unknown model 'sqll'"),
    ({"model": f"{SERVED}:sqll"}, 404, "Unknown adapter 'sqll'"),
    ({"model": f"{SERVED}:"}, 404, "Unknown adapter ''"),
    ({"model": "other:sql"}, 404, "Unknown model 'other:sql'"),
    ({"model": SERVED, "lora_path": "sqll"}, 404, "Unknown adapter 'sqll'"),
    ({"model": "sqll", "lora_path": "sqll"}, 404, "Unknown adapter 'sqll'"),
    ({"model": f"{SERVED}:sql", "lora_path": "french"}, 400, "model names the adapter 'sql'"),
    ({"model": "sql", "lora_path": "french"}, 400, "model names the adapter 'sql'"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "status", "words"), WRONG)
def test_wrong_names_in_the_openai_apis(
    server: live.LiveServer, fields: dict[str, Any], status: int, words: str, stream: bool
) -> None:
    for reply in (complete(server, stream=stream, **fields), chat(server, stream=stream, **fields)):
        assert reply.status == status
        error = reply.json()
        assert words in error["message"] and error["code"] == status and error["object"] == "error"
        assert error["type"] == ("NotFoundError" if status == 404 else "BadRequestError")
        assert error["param"] == ("model" if "lora_path" not in fields else "lora_path")


def test_the_native_api_names_the_five_nearest(server: live.LiveServer) -> None:
    for wrong in ("sqll", ["sql", "sqll"]):
        reply = server.post(
            "/generate", {"text": PROMPT if wrong == "sqll" else [PROMPT] * 2, "lora_path": wrong}
        )
        assert reply.status == 404
        message = reply.json()["error"]["message"]
        assert message.startswith("Unknown adapter 'sqll'; nearest loaded: sql, ")
        assert sum(name in message.split("nearest")[1] for name in NAMES) == 5
    reply = server.post("/generate", {"text": PROMPT, "lora_path": "sqll", "stream": True})
    error = json.loads(reply.text.splitlines()[0].removeprefix("data: "))["error"]
    assert error["code"] == 404 and "Unknown adapter 'sqll'" in error["message"]


def test_apis_without_adapters_say_so(server: live.LiveServer) -> None:
    asked = [{"role": "user", "content": PROMPT}]
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/v1/responses", {"input": PROMPT, "max_output_tokens": 4}),
        ("/api/chat", {"messages": asked, "stream": False, "options": {"num_predict": 4}}),
        ("/api/generate", {"prompt": PROMPT, "stream": False, "options": {"num_predict": 4}}),
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [5]}),
    ]
    for path, fields in requests:
        assert server.post(path, {"model": SERVED, **fields}).status == 200, path
        for model in ("sql", f"{SERVED}:sql"):
            reply = server.post(path, {"model": model, **fields})
            assert reply.status == 400 and "base model only" in reply.text, (path, reply.text)
        reply = server.post(path, {"model": "sqll", **fields})
        assert reply.status == 404 and "Unknown model 'sqll'" in reply.text, (path, reply.text)


def test_anthropic_messages_serve_adapters(server: live.LiveServer) -> None:
    def ask(model: str) -> live.Reply:
        messages = [{"role": "user", "content": PROMPT}]
        return server.post(
            "/v1/messages", {"model": model, "max_tokens": 12, "temperature": 0, "messages": messages}
        )

    def said(reply: live.Reply) -> str:
        assert reply.status == 200, reply.text
        return "".join(str(block.get("text", "")) for block in reply.json()["content"])

    assert said(ask("sql")) == said(ask(f"{SERVED}:sql")) != said(ask(SERVED))
    reply = ask("sqll")
    assert (
        400 <= reply.status < 500 and "Unknown model 'sqll'" in reply.text and reply.json()["type"] == "error"
    )


def test_models_lists_adapters(server: live.LiveServer) -> None:
    cards = {card["id"]: card for card in server.get("/v1/models").json()["data"]}
    assert set(cards) == {SERVED, *NAMES}
    assert all(cards[name]["parent"] == SERVED for name in NAMES)


def test_an_unmodified_openai_client(server: live.LiveServer) -> None:
    import openai

    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    assert {model.id for model in client.models.list()} == {SERVED, *NAMES}
    for name in ("sql", "french"):
        done = client.completions.create(
            model=name, prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
        )
        assert done.choices[0].text == native(server, name)
    with pytest.raises(openai.NotFoundError, match="nearest loaded adapters: sql"):
        client.completions.create(model="sqll", prompt=PROMPT, max_tokens=1)


def test_lists_that_do_not_fit_the_prompts(server: live.LiveServer) -> None:
    """A list for a single prompt ends the scheduler process of stock SGLang."""
    one = server.post(
        "/generate", {"text": PROMPT, "lora_path": ["sql"], "sampling_params": {"max_new_tokens": 1}}
    )
    assert one.status == 200
    for text_, names in (
        (PROMPT, ["sql", "sql"]),
        (PROMPT, []),
        ([PROMPT] * 3, ["sql"]),
        ([PROMPT], ["sql"] * 2),
    ):
        reply = server.post("/generate", {"text": text_, "lora_path": names})
        assert reply.status == 400 and "one per prompt" in reply.text
        assert complete(server, prompt=text_, lora_path=names).status == 400
    two = {"max_new_tokens": 2, "n": 2}
    for names in ("sql", ["sql", None]):
        reply = server.post("/generate", {"text": [PROMPT] * 2, "lora_path": names, "sampling_params": two})
        assert reply.status == 200 and len(reply.json()) == 4
    assert server.alive()


def test_a_wrong_name_leaves_nothing_behind(server: live.LiveServer) -> None:
    for _ in range(10):
        reply = server.post("/generate", {"text": PROMPT, "lora_path": "sqll", "rid": "the-same"})
        assert reply.status == 404 and "Unknown adapter" in reply.text
    assert "Task exception was never retrieved" not in server.log_text()
    assert server.alive()


def test_stock_names_by_flag(demo: Demo, tmp_path: Path) -> None:
    flags = (*FLAGS, "--elora-adapter-names", "stock", "--served-model-name", SERVED)
    with live.server(demo.model, *flags, "--lora-paths", *demo.lora_paths("sql"), log_dir=tmp_path) as server:
        base, sql = native(server, None), native(server, "sql")
        assert base != sql
        assert text(complete(server, model="sql")) == base  # stock: a bare name is the base model
        assert text(complete(server, model="anything")) == base
        assert text(complete(server, model="other:sql")) == sql
        assert complete(server, model=f"{SERVED}:sqll").status in (400, 404)


def test_a_broken_adapter_at_start_ends_the_launch(demo: Demo, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(demo.adapters["sql"], folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    argv = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(demo.model), "--device", "cpu"]
    argv += [
        "--port",
        str(live.free_port()),
        *FLAGS,
        "--lora-paths",
        *demo.lora_paths("french"),
        f"bad={folder}",
    ]
    status, output = live.run(argv, log=tmp_path / "start.log", timeout=180)
    assert status not in (0, 124), output[-2000:]
    lines = [line for line in output.splitlines() if "Adapter refused" in line]
    assert len(lines) == 1 and lines[0].startswith(
        f"elora: Adapter refused: {weights}: truncated safetensors"
    )
