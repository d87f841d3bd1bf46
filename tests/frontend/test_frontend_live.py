"""Frontend programs and the two examples against a live ``--elora`` server: answers equal plain HTTP."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sglang as sgl
from support import live
from support.demo_paths import Demo
from support.stock_programs import openai_backend

from elora_sglang.frontend import BASE

ADAPTERS = ("sql", "french", "legal", "support")
QUESTION = "user: How do I sell the blue piano at the market?\nassistant:"
STOP = {"stop": "\n", "ignore_eos": False}


@pytest.fixture(scope="module")
def server(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.LiveServer]:
    flags = ("--elora", "--dtype", "float32", "--served-model-name", "demo", "--max-running-requests", "8")
    with live.server(
        demo.model,
        *flags,
        *(
            "--max-total-tokens",
            "8000",
            "--stream-interval",
            "1",
            "--lora-paths",
            *demo.lora_paths(*ADAPTERS),
        ),
        log_dir=tmp_path_factory.mktemp("frontend"),
        boot_timeout=600,
    ) as running:
        yield running


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(live.ROOT / "examples"))
    yield
    for name in ("connect", "router", "agent"):
        sys.modules.pop(name, None)


def http(server: live.LiveServer, prompt: str, adapter: str | None, tokens: int = 32) -> str:
    """The same request without a program."""
    reply = server.generate(prompt, lora_path=adapter, max_new_tokens=tokens, sampling=STOP)
    return str(reply["text"])


def chosen(server: live.LiveServer, prompt: str, choices: list[str], adapter: str | None) -> str:
    """What ``select`` must choose: the choice whose tokens are likeliest on average, from one request each.

    SGLang counts from the last token of the prompt on; that one counts for all choices alike.
    """
    start = server.generate(prompt, lora_path=adapter, max_new_tokens=0)["meta_info"]["prompt_tokens"] - 2
    scores = []
    for choice in choices:
        reply = server.generate(
            prompt + choice,
            lora_path=adapter,
            max_new_tokens=0,
            return_logprob=True,
            logprob_start_len=start,
            return_text_in_logprobs=True,
        )
        tokens = reply["meta_info"]["input_token_logprobs"]
        if prompt.endswith(tokens[0][2]):
            tokens = tokens[1:]
        values = [logprob for logprob, *_ in tokens if logprob]
        scores.append(sum(values) / len(values))
    return choices[max(range(len(choices)), key=scores.__getitem__)]


@sgl.function
def answers(s: Any, prompt: str = QUESTION, adapter: Any = None) -> None:
    s += prompt + sgl.gen("answer", max_tokens=32, temperature=0, stop="\n", lora_path=adapter)


def test_every_place_answers_as_http_does(server: live.LiveServer) -> None:
    backend = sgl.RuntimeEndpoint(server.url)
    expected = {name: http(server, QUESTION, name) for name in (None, *ADAPTERS)}
    assert len(set(expected.values())) == len(expected)
    assert answers.run(backend=backend)["answer"] == expected[None]
    assert answers.run(adapter="sql", backend=backend)["answer"] == expected["sql"]
    assert answers.run(lora_path="legal", backend=backend)["answer"] == expected["legal"]
    assert answers.bind(lora_path="french").run(backend=backend)["answer"] == expected["french"]
    by_default = sgl.RuntimeEndpoint(server.url, lora_path="support")
    assert answers.run(backend=by_default)["answer"] == expected["support"]
    assert answers.run(lora_path=BASE, backend=by_default)["answer"] == expected[None]
    rows: list[dict[str, Any]] = [{"lora_path": name} for name in (*ADAPTERS, BASE)] + [{}]
    states = answers.run_batch(rows, backend=by_default, num_threads=6)
    names = (*ADAPTERS, None, "support")
    assert [state["answer"] for state in states] == [expected[name] for name in names]
    stream = answers.run(lora_path="sql", backend=backend, stream=True)
    pieces = list(stream.text_iter("answer"))
    assert len(pieces) > 1
    assert "".join(pieces) == expected["sql"]


def test_fork_select_and_choices_answer_as_http_does(server: live.LiveServer) -> None:
    choices = [" SELECT", " Sure", " Pursuant", " Hello"]

    @sgl.function
    def program(s: Any) -> None:
        s += QUESTION
        s.sync()
        forks = s.fork(4)
        forks += lambda i: sgl.gen(
            "a", max_tokens=16, temperature=0, stop="\n", lora_path=(*ADAPTERS[:3], None)[i]
        )
        forks.join()
        with s.copy() as branch:
            branch += sgl.select("mine", choices)
        with s.copy() as branch:
            branch += sgl.gen("base", choices=choices, lora_path=BASE)

    state = program.run(lora_path="support", backend=sgl.RuntimeEndpoint(server.url))
    assert state["a"] == [http(server, QUESTION, name, 16) for name in ADAPTERS]
    assert state["mine"] == [chosen(server, QUESTION, choices, "support")]
    assert state["base"] == [chosen(server, QUESTION, choices, None)]
    assert state["mine"] != state["base"]


def test_kv_computed_ahead_of_a_fork_is_the_adapters(server: live.LiveServer) -> None:
    server.post("/flush_cache")

    @sgl.function
    def program(s: Any) -> None:
        s += QUESTION
        s.sync()
        forks = s.fork(2)
        forks += sgl.gen("answer", max_tokens=2)
        for fork in forks.states:
            s.stream_executor.meta_info[f"fork{fork.stream_executor.sid}"] = fork.get_meta_info("answer")

    state = program.run(lora_path="sql", backend=sgl.RuntimeEndpoint(server.url))
    state.sync()
    for meta in state.stream_executor.meta_info.values():
        assert meta["cached_tokens"] >= meta["prompt_tokens"] - 1 > 5


def test_openai_backend_answers_as_http_does(server: live.LiveServer) -> None:
    text = openai_backend(server.url, model="demo", is_chat_model=False)
    assert answers.run(adapter="sql", backend=text)["answer"] == http(server, QUESTION, "sql")
    stream = answers.run(lora_path="legal", backend=text, stream=True)
    assert "".join(stream.text_iter("answer")) == http(server, QUESTION, "legal")

    @sgl.function
    def chat(s: Any) -> None:
        s += sgl.user("How do I sell the blue piano at the market?")
        s += sgl.assistant(sgl.gen("answer", max_tokens=32, temperature=0, stop="\n"))

    backend = openai_backend(server.url, model="demo", lora_path="french")
    payload: dict[str, Any] = {
        "messages": [{"role": "user", "content": "How do I sell the blue piano at the market?"}],
        "max_tokens": 32,
        "temperature": 0,
        "stop": "\n",
    }
    said = {}
    for name in ("french", "sql"):
        reply = server.post("/v1/chat/completions", {"model": f"demo:{name}", **payload})
        said[name] = reply.json()["choices"][0]["message"]["content"]
    assert said["french"] != said["sql"]
    assert chat.run(backend=backend)["answer"] == said["french"]
    assert chat.run(backend=backend, lora_path="sql", stream=True)["answer"] == said["sql"]


def test_unknown_adapter_ends_the_program_with_the_servers_words(server: live.LiveServer) -> None:
    with pytest.warns(UserWarning, match="Unknown adapter 'sqll'; nearest loaded: sql"):
        error = answers.run(lora_path="sqll", backend=sgl.RuntimeEndpoint(server.url)).error()
    assert "Unknown adapter 'sqll'" in str(error)


def shown(module: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What ``python examples/MODULE.py ARGUMENTS`` prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(module.__file__), *arguments])
        module.main()
    return capsys.readouterr().out


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("rule", ["select", "words"])
def test_router(server: live.LiveServer, rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    router: Any = importlib.import_module("router")
    turns = json.loads(shown(router, ["--url", server.url, "--rule", rule, "--json"], capsys))
    assert [turn["question"] for turn in turns] == list(router.QUESTIONS)
    assert len({turn["adapter"] for turn in turns}) > 1
    desks = [f" {desk}" for desk in router.DESKS]
    history = ""
    for turn in turns:
        history += f"user: {turn['question']}\nassistant:"
        assert turn["prompt"] == history
        asked = f"{history} This is for our desk of"
        picked = (
            chosen(server, asked, desks, None).strip()
            if rule == "select"
            else router.by_words(turn["question"])
        )
        assert turn["adapter"] == picked
        assert turn["answer"] == http(server, history, picked)
        assert turn["answer"] != http(server, history, None)
        history += f"{turn['answer']}\n"


@pytest.mark.usefixtures("examples")
def test_agent_finds_its_turns_in_the_cache(
    server: live.LiveServer, capsys: pytest.CaptureFixture[str]
) -> None:
    agent: Any = importlib.import_module("agent")
    server.post("/flush_cache")
    *calls, base = json.loads(shown(agent, ["--url", server.url, "--json"], capsys))
    assert [call["purpose"] for call in calls] == [f"{p}{n}" for n in range(3) for p in ("query", "reply")]
    for earlier, call in itertools.pairwise(calls):
        assert call["prompt"].startswith(earlier["prompt"] + earlier["answer"])
        assert call["prompt_tokens"] > call["cached_tokens"] >= earlier["prompt_tokens"] - 1
    assert (base["prompt"], base["adapter"], base["cached_tokens"]) == (calls[-1]["prompt"], None, 0)
    for call in (*calls, base):
        assert call["answer"] == http(server, call["prompt"], call["adapter"])


@pytest.mark.parametrize("name", ["router", "agent"])
def test_examples_run_as_commands(server: live.LiveServer, name: str, tmp_path: Path) -> None:
    script = str(live.ROOT / "examples" / f"{name}.py")
    status, output = live.run(
        [sys.executable, script, "--url", server.url], log=tmp_path / "example.log", timeout=300
    )
    assert status == 0, output[-3000:]
    expected = {
        "router": ("user       What is the status of order 603?", "tokens, "),
        "agent": ("call        prompt cached  answer", "base model "),
    }
    for words in expected[name]:
        assert words in output


@pytest.mark.usefixtures("examples")
def test_examples_say_what_is_missing(server: live.LiveServer) -> None:
    connect = importlib.import_module("connect").connect
    with pytest.raises(SystemExit, match=r"has no adapter 'nope'; loaded: french, legal, sql, support$"):
        connect(server.url, ["sql", "nope"])
    with pytest.raises(
        SystemExit, match=rf"^no SGLang server at http://127.0.0.1:{(port := live.free_port())}: "
    ):
        connect(f"http://127.0.0.1:{port}", [])
