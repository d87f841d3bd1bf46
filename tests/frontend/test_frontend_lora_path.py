"""``lora_path`` on the wire: every request of a program goes to the adapter that the nearest place names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.backend.base_backend import BaseBackend
from support.recording import Recorder, recording_server
from support.stock_programs import METHODS, PREFIX, openai_backend, plain, speculated

from elora_sglang.frontend import BASE

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with recording_server() as found:
        yield found


def endpoint(recorder: Recorder, **options: Any) -> Any:
    backend = sgl.RuntimeEndpoint(recorder.url, **options)
    recorder.clear()
    return backend


@sgl.function
def asks(s: Any, adapter: Any = None, **rest: Any) -> None:
    s += "Question? " + sgl.gen("answer", max_tokens=4, lora_path=adapter)


CALLS = {
    "gen": lambda **adapter: sgl.gen("x", max_tokens=4, **adapter),
    "gen_choices": lambda **adapter: sgl.gen("x", choices=["a", "bc"], **adapter),
    "gen_int": lambda **adapter: sgl.gen_int("x", **adapter),
    "gen_string": lambda **adapter: sgl.gen_string("x", **adapter),
    "in_role": lambda **adapter: sgl.assistant(sgl.gen("x", **adapter)),
    "n": lambda **adapter: sgl.gen("x", n=3, regex="[a-z]+", return_logprob=True, **adapter),
    "select": lambda **adapter: sgl.select("x", choices=["a", "bc"], **adapter),
    **{
        f"select_{method.__class__.__name__}": lambda method=method, **adapter: sgl.select(
            "x", choices=["a", "bc"], choices_method=method, **adapter
        )
        for method in METHODS
    },
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("call", CALLS)
def test_adds_lora_path_to_every_request_and_nothing_else(
    recorder: Recorder, call: str, stream: bool
) -> None:
    def sent(**adapter: Any) -> list[dict[str, Any]]:
        backend = endpoint(recorder)

        @sgl.function
        def program(s: Any) -> None:
            s += "Text " + CALLS[call](**adapter)

        state = program.run(backend=backend, stream=stream)
        assert state.text().startswith("Text ") or call == "in_role"
        assert state.error() is None
        return recorder.bodies()

    base = sent()
    assert all("lora_path" not in body for body in base)
    assert sent(lora_path="sql") == [{**body, "lora_path": "sql"} for body in base]
    assert sent(lora_path=BASE) == base
    expected = 3 if "UnconditionalLikelihood" in call else 2 if "select" in call or "choices" in call else 1
    assert len(base) == expected


def test_answers_are_the_adapters(recorder: Recorder) -> None:
    """The recorder answers by prompt and adapter; text, variable and meta_info come from the adapter."""
    for stream in (False, True):
        state = asks.run("sql", backend=endpoint(recorder), stream=stream)
        assert "".join(state.text_iter("answer")) == state["answer"]
        assert state["answer"].startswith(" sql-")
        assert state.get_meta_info("answer")["cached_tokens"] == 0


@pytest.mark.parametrize("gen", [None, BASE, "g"])
@pytest.mark.parametrize("run", [None, BASE, "r"])
@pytest.mark.parametrize("bound", [None, BASE, "p"])
@pytest.mark.parametrize("default", [None, BASE, "b"])
def test_the_nearest_place_wins(recorder: Recorder, gen: Any, run: Any, bound: Any, default: Any) -> None:
    backend = endpoint(recorder, lora_path=default)
    program = asks.bind(lora_path=bound)
    program.run(gen, lora_path=run, backend=backend).sync()
    program.run_batch([{"adapter": gen, "lora_path": run}], backend=backend)[0].sync()
    nearest = next((path for path in (gen, run, bound, default) if path is not None), BASE)
    assert recorder.adapters() == [None if nearest is BASE else nearest] * 2


def test_two_gens_of_one_program(recorder: Recorder) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "a" + sgl.gen("x", lora_path="sql") + sgl.gen("y") + sgl.gen("z", lora_path=BASE)

    program.run(lora_path="legal", backend=endpoint(recorder)).sync()
    assert recorder.adapters() == ["sql", "legal", None]
    recorder.clear()
    program.run(backend=endpoint(recorder)).sync()
    assert recorder.adapters() == ["sql", None, None]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("generator", [False, True])
def test_run_batch_one_adapter_per_row(recorder: Recorder, threads: int, generator: bool) -> None:
    backend = endpoint(recorder, lora_path="d")
    rows: list[dict[str, Any]] = [{"lora_path": path} for path in ("a", "b", None, BASE, "a")] + [{}]
    before = [dict(row) for row in rows]
    states = asks.run_batch(
        rows, backend=backend, num_threads=threads, generator_style=generator, max_new_tokens=3
    )
    names = ["a", "b", "d", "base", "a", "d"]
    assert [state["answer"].split("-")[0].strip() for state in states] == names
    assert rows == before


def test_run_batch_for_all_rows(recorder: Recorder) -> None:
    states = asks.run_batch([("g",), ()], lora_path="all", backend=endpoint(recorder))
    assert [state["answer"].split("-")[0].strip() for state in states] == ["g", "all"]
    assert asks.run(backend=endpoint(recorder))["answer"].startswith(" base-")


def test_fork_and_joins(recorder: Recorder) -> None:
    """Forks share the program's default; the KV computed ahead of them is computed with an adapter."""

    @sgl.function
    def program(s: Any, first: Any) -> None:
        s += "Start " + sgl.gen("x", max_tokens=2, lora_path=first)
        s.sync()  # SGLang computes KV ahead of a fork only where it sees text already
        forks = s.fork(3)
        forks += lambda i: sgl.gen("tip", max_tokens=2, lora_path=(None, "g", BASE)[i])
        forks.join()
        inner = s.fork(2)
        nested = inner[0].fork(2)
        nested += sgl.gen("deep", max_tokens=2)
        nested.join()
        inner.join("concate_and_append")
        s += sgl.gen("end", max_tokens=2)

    def run(first: Any, **options: Any) -> list[str | None]:
        backend = endpoint(recorder)
        state = program.run(first, backend=backend, **options)
        state.sync()
        assert state.error() is None
        paths = {path for _, path, _, _ in recorder.requests}
        assert ("/concate_and_append_request" in paths) == (first is None and not options)
        return [
            (body["sampling_params"]["max_new_tokens"], body.get("lora_path")) for body in recorder.bodies()
        ]

    with_default = run(None, lora_path="sql")
    assert [a for n, a in with_default if n == 0] == ["sql"] * 3
    assert sorted(str(a) for n, a in with_default if n) == sorted(["sql"] * 5 + ["g", "None"])
    # no default: KV is computed ahead for the adapter that answered last; the other requests are the base's
    by_gen = run("sql")
    assert [a for n, a in by_gen if n == 0] == ["sql"] * 3
    assert sorted(str(a) for n, a in by_gen if n) == sorted(["sql", "g"] + ["None"] * 5)
    assert [a for n, a in run(None) if n == 0] == [None] * 5  # two more: the join concatenates KV


def test_join_concatenates_the_same_text(recorder: Recorder) -> None:
    @sgl.function
    def program(s: Any) -> None:
        s += "Start"
        forks = s.fork(2)
        forks += sgl.gen("tip", max_tokens=2, lora_path="sql")
        forks.join("concate_and_append")

    state = program.run(backend=endpoint(recorder))
    tip = state.text().removeprefix("Start")
    assert tip[: len(tip) // 2] == tip[len(tip) // 2 :] != ""
    assert "/concate_and_append_request" not in {path for _, path, _, _ in recorder.requests}


def prefixes(recorder: Recorder) -> list[str | None]:
    """Adapters of the requests that only compute the common prefix."""
    return [
        body.get("lora_path")
        for body in recorder.bodies()
        if body["text"] == PREFIX and body["sampling_params"] == {"max_new_tokens": 0}
    ]


@sgl.function
def long_prefix(s: Any, question: str, adapter: Any = None) -> None:
    s += PREFIX
    s += question
    s += sgl.gen("answer", max_tokens=2, lora_path=adapter)


def test_prefix_of_a_batch_is_computed_with_its_adapters(recorder: Recorder) -> None:
    def batch(*rows: dict[str, Any], program: Any = long_prefix, **options: Any) -> list[str | None]:
        backend = endpoint(recorder, **options)
        program.run_batch([{"question": "q", **row} for row in rows], backend=backend, num_threads=2)
        return prefixes(recorder)

    sql, legal = {"lora_path": "sql"}, {"lora_path": "legal"}
    assert batch({}, {}) == [None]
    assert batch(sql, sql) == ["sql"]
    assert batch(sql, legal, {}, sql, {}, legal, {"lora_path": "once"}) == ["sql", "legal", None]
    assert batch({}, {}, lora_path="backend") == ["backend"]
    assert batch({}, {"lora_path": BASE}, {"lora_path": BASE}, lora_path="backend") == [None]
    assert batch({}, {}, program=long_prefix.bind(lora_path="bound")) == ["bound"]
    assert batch({"adapter": "arg"}, {"adapter": "arg"}, legal, legal) == ["arg", "legal"]
    assert batch(sql, legal) == []  # nobody shares it


def test_prefix_goes_to_the_adapter_of_the_first_gen(recorder: Recorder) -> None:
    @sgl.function
    def fixed(s: Any, question: str) -> None:
        s += PREFIX
        s += question
        s += sgl.gen("answer", lora_path="fixed")

    @sgl.function
    def computed(s: Any, question: str) -> None:
        s += PREFIX
        s += question
        s += sgl.gen("answer", lora_path=s["route"])

    backend = endpoint(recorder)
    fixed.run_batch([{"question": q} for q in "ab"], backend=backend)
    fixed.cache(backend=backend)
    assert prefixes(recorder) == ["fixed"] * 2
    recorder.clear()
    long_prefix.bind(lora_path="bound").cache(backend=backend)
    long_prefix.cache(backend=backend)
    backend.cache_prefix(PREFIX)
    endpoint_with_default = sgl.RuntimeEndpoint(recorder.url, lora_path="d")
    endpoint_with_default.cache_prefix(PREFIX)
    assert prefixes(recorder) == ["bound", None, None, "d"]


def test_own_parameter_is_the_programs(recorder: Recorder) -> None:
    @sgl.function
    def program(s: Any, lora_path: str) -> None:
        s += "Path " + lora_path + sgl.gen("x")

    backend = endpoint(recorder)
    program.run(lora_path="file", backend=backend).sync()
    program.bind(lora_path="file").run(backend=backend).sync()
    program.run_batch([{"lora_path": "file"}], backend=backend)
    assert recorder.adapters() == [None] * 3
    assert {body["text"] for body in recorder.bodies()} == {"Path file"}


def test_trace_and_nested_programs(recorder: Recorder) -> None:
    @sgl.function
    def outer(s: Any, question: str) -> None:
        s += question + sgl.gen("x", lora_path=s.get_var("question"))
        asks(lora_path="sql")

    tracer = asks.trace(lora_path="sql", backend=BaseBackend())
    assert [type(node).__name__ for node in tracer.flatten_nodes()] == ["SglConstantText", "SglGen"]
    tracer = outer.trace(backend=BaseBackend())
    assert len(tracer.child_states) == 1


def openai(recorder: Recorder, **options: Any) -> Any:
    backend = openai_backend(recorder.url, **options)
    recorder.clear()
    return backend


@sgl.function
def talk(s: Any, adapter: Any = None) -> None:
    s += sgl.user("Hi")
    s += sgl.assistant(sgl.gen("answer", max_tokens=4, lora_path=adapter))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openai_model_name(recorder: Recorder, stream: bool) -> None:
    backend = openai(recorder, lora_path="d")
    for options in ({"adapter": "sql"}, {"adapter": BASE}, {"lora_path": "legal"}, {}):
        talk.run(backend=backend, stream=stream, **options).sync()
    assert recorder.models(CHAT) == ["base:sql", "base", "base:legal", "base:d"]
    backend = openai(recorder, is_chat_model=False)
    state = asks.run(
        "demo1", backend=backend, stream=stream
    )  # a name in which SGLang would read the model o1
    assert state["answer"] == "base:demo1 answered."
    assert recorder.models(TEXT) == ["base:demo1"]
    assert recorder.bodies(TEXT)[0]["max_tokens"] == 4
    assert "lora_path" not in recorder.bodies(TEXT)[0]
    assert backend.model_name == "base"
    assert backend.token_usage.completion_tokens == 1


def test_openai_constrained_and_select(recorder: Recorder) -> None:
    backend = openai(recorder, is_chat_model=False, lora_path="sql")

    @sgl.function
    def program(s: Any) -> None:
        s += "Text " + sgl.gen("name", dtype=str) + sgl.gen("n", dtype=int)

    @sgl.function
    def chooses(s: Any) -> None:
        s += "Text " + sgl.select("x", choices=["an answer", "eightish"])

    program.run(backend=backend).sync()
    assert recorder.models(TEXT) == ["base:sql"] * 2
    recorder.clear()
    chooses.run(lora_path="legal", backend=backend).sync()
    assert recorder.models(TEXT)[:1] == ["base:legal"]


def test_openai_speculation_goes_to_one_adapter_per_role(recorder: Recorder) -> None:
    backend = openai(recorder)
    speculated.run("Who?", lora_path="sql", backend=backend).sync()
    speculated.run("Who?", backend=backend).sync()
    assert set(recorder.models(CHAT)) == {"base:sql", "base"}
    assert recorder.models(CHAT) == ["base:sql"] * 3 + ["base"] * 3  # three tries each: no answer matches
    assert (backend.spec_kwargs, backend.spec_format) == ({}, [])

    @sgl.function(num_api_spec_tokens=16)
    def mixed(s: Any) -> None:
        s += sgl.user("Who?")
        s += sgl.assistant("Name:" + sgl.gen("a", lora_path="sql") + "Job:" + sgl.gen("b", lora_path="legal"))

    with pytest.warns(UserWarning, match="one adapter per role"):
        error = mixed.run(backend=backend).error()
    assert isinstance(error, ValueError)
    assert "\n" not in str(error)


def test_speculated_words_of_another_adapter_are_not_used(recorder: Recorder) -> None:
    @sgl.function(num_api_spec_tokens=64)
    def program(s: Any, second: Any) -> None:
        s += "Text" + sgl.gen("a", stop=" ", lora_path="sql") + " " + sgl.gen("b", stop=".", lora_path=second)

    for second, models in (("sql", ["base:sql"]), ("legal", ["base:sql", "base:legal"])):
        state = program.run(second, backend=openai(recorder, is_chat_model=False))
        state.sync()
        assert (state["a"], recorder.models(TEXT)) == ("base:sql", models)
        assert state["b"] == ("answered" if second == "sql" else "base:legal answered")


@pytest.mark.parametrize("wrong", [7, ["sql"], b"sql", True, {"name": "sql"}])
def test_not_a_string(recorder: Recorder, wrong: Any) -> None:
    backend = endpoint(recorder)
    for where, call in {
        "sgl.gen": lambda: sgl.gen("x", lora_path=wrong),
        "sgl.select": lambda: sgl.select("x", choices=["a"], lora_path=wrong),
        "asks.run": lambda: asks.run(lora_path=wrong, backend=backend),
        "asks.bind": lambda: asks.bind(lora_path=wrong),
        "asks.run_batch": lambda: asks.run_batch([{}], lora_path=wrong, backend=backend),
        "asks.run_batch, row 1": lambda: asks.run_batch([{}, {"lora_path": wrong}], backend=backend),
        "RuntimeEndpoint": lambda: sgl.RuntimeEndpoint(recorder.url, lora_path=wrong),
    }.items():
        with pytest.raises(TypeError) as error:
            call()
        message = str(error.value)
        assert message.startswith(f"lora_path of {where} is {wrong!r}, not a string; give the name")
        assert "\n" not in message
    assert recorder.requests == []


def test_empty_and_unresolved_names() -> None:
    with pytest.raises(ValueError, match=r"lora_path of sgl.gen is empty"):
        sgl.gen("x", lora_path=" ")
    placeholder = asks.trace(backend=BaseBackend()).get_var("answer")
    with pytest.raises(TypeError, match="not a string"):
        sgl.gen("x", lora_path=placeholder)


class NoAdapters(BaseBackend):
    """Stands for Anthropic, LiteLLM and VertexAI, whose packages are not installed everywhere."""

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        return "answer", {}


def test_backends_without_adapters_say_so(recorder: Recorder) -> None:
    line = r"^lora_path='sql': the backend NoAdapters knows no adapters; use RuntimeEndpoint\(URL\), or .*$"
    backend = NoAdapters()
    for refused in (
        lambda: asks.run("sql", backend=backend),
        lambda: asks.run(lora_path="sql", backend=backend),
        lambda: asks.run_batch([{}, {"lora_path": "sql"}], backend=backend),
    ):
        with pytest.raises(ValueError, match=line) as error:
            refused()
        assert "\n" not in str(error.value)
    assert asks.run(backend=backend)["answer"] == "answer"
    assert asks.run(BASE, lora_path=BASE, backend=backend)["answer"] == "answer"


def test_openai_servers_without_adapters_say_so(recorder: Recorder) -> None:
    real = openai_backend("https://api.openai.com")
    azure = openai_backend("https://example.com", is_azure=True, api_version="1")
    with pytest.raises(ValueError, match=r"talks to api.openai.com, which has no SGLang adapters"):
        talk.run("sql", backend=real)
    with pytest.raises(ValueError, match=r"talks to example.com, which has no SGLang adapters"):
        talk.run(lora_path="sql", backend=azure)
    with pytest.raises(ValueError, match="model 'base:sql' names an adapter already"):
        openai_backend(recorder.url, model="base:sql", lora_path="legal")


def test_cost_of_an_expression_is_nothing() -> None:
    """No state is left on expressions and programs that never say ``lora_path``."""
    assert not hasattr(sgl.gen("x"), "lora_path")
    assert not hasattr(plain, "lora_path")
    assert json.dumps(sgl.gen("x").sampling_params.to_srt_kwargs()).count("lora") == 0
