"""Programs that never say ``lora_path``, over all that sends requests; run with and without the import.

``python stock_programs.py URL`` runs them on SGLang alone.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import sglang as sgl

PREFIX = "Answer the questions of our customers briefly and without any invention. " * 2
METHODS = (
    sgl.token_length_normalized,
    sgl.greedy_token_selection,
    sgl.unconditional_likelihood_normalized,
)


class WordTokenizer:
    """Stands for tiktoken's encodings, which are fetched from the net."""

    _mergeable_ranks: ClassVar = {b"1": 0, b"a": 1}
    _special_tokens: ClassVar = {"<|endoftext|>": 2}

    def decode(self, ids: list[int]) -> str:
        return "1a "[ids[0]]

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    @classmethod
    def encoding_for_model(cls, name: str) -> WordTokenizer:
        return cls()


def openai_backend(url: str, model: str = "base", **options: Any) -> Any:
    """SGLang's OpenAI backend on a server at ``url``, without the net."""
    import sglang.lang.backend.openai as module

    module.tiktoken = WordTokenizer
    return sgl.OpenAI(model, base_url=f"{url}/v1", api_key="none", **options)


@sgl.function
def everything(s: Any, question: str) -> None:
    s += PREFIX + question
    s += sgl.gen("text", max_tokens=8, temperature=0)
    for number, method in enumerate(METHODS):
        s += sgl.select(f"choice{number}", choices=["yes", "no"], choices_method=method)
    s += sgl.gen("same", choices=["red", "blue"])
    s += sgl.gen_int("count", max_tokens=4)
    s += sgl.gen_string("name")
    s += sgl.gen("date", regex=r"\d+", n=2)
    s.sync()  # SGLang computes KV ahead of a fork only where it sees text already
    forks = s.fork(2)
    forks += lambda i: sgl.gen("tip", max_tokens=4 + i)
    forks.join()
    more = s.fork(2)
    more += sgl.gen("more", max_tokens=3)
    more.join("concate_and_append")
    s += sgl.gen("end", stop="\n")


@sgl.function
def chat(s: Any, question: str) -> None:
    s += sgl.system("Be kind.")
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=8))
    s += sgl.user("And more?")
    s += sgl.assistant(sgl.gen("more", stop="!"))


@sgl.function(num_api_spec_tokens=16)
def speculated(s: Any, question: str) -> None:
    s += sgl.user(question)
    with s.assistant():
        s += "Name:" + sgl.gen("name", stop=".") + "Job:" + sgl.gen("job", stop=".")


@sgl.function
def plain(s: Any, question: str) -> None:
    s += question + sgl.gen("answer", max_tokens=8)


@sgl.function
def own_argument(s: Any, lora_path: str) -> None:
    """A parameter called ``lora_path`` belongs to the program, as without ELORA."""
    s += "The path is " + lora_path + sgl.gen("answer", max_tokens=8)


def run_all(url: str) -> list[str]:
    """Run every program; returns the texts."""
    endpoint = sgl.RuntimeEndpoint(url)
    states = [
        everything.run("Why?", backend=endpoint, temperature=0.5),
        everything.bind(question="How?").run(backend=endpoint),
        everything.run("Where?", backend=endpoint, stream=True),
        everything.run("Who?", backend=endpoint, use_thread=False),
        own_argument.run(lora_path="adapters/x", backend=endpoint),
        chat.run("Why?", backend=endpoint),
        *everything.run_batch([{"question": q} for q in "abc"], backend=endpoint, num_threads=1),
        *everything.run_batch([("x",), ("y",)], backend=endpoint, num_threads=2),
        *everything.run_batch([("x",), ("y",)], backend=endpoint, num_threads=2, generator_style=True),
    ]
    everything.cache(backend=endpoint)
    chat.trace(backend=endpoint, question="q")
    # Stock cannot stream from a completion model: it passes a parameter that the openai client does not know.
    backend = openai_backend(url)
    states += [chat.run("Why?", backend=backend), chat.run("Why?", backend=backend, stream=True)]
    states.append(plain.run("Why?", backend=openai_backend(url, is_chat_model=False)))
    states.append(speculated.run("Who?", backend=openai_backend(url)))
    return [state.text() for state in states]


if __name__ == "__main__":
    run_all(sys.argv[1])
