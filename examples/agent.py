"""An agent that works through several turns with one adapter, and finds its earlier turns in the cache.

    python examples/agent.py --url http://127.0.0.1:30000 --adapter sql

In each turn the adapter writes a query, a tool answers it, and the adapter puts the result into words. The
prompt grows with every call, but only its new end is computed: ``cached_tokens`` says how much was there. The
last line asks the same of the base model, which shares no KV with the adapter.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import zlib
from typing import Any

import sglang as sgl
from connect import connect

from elora_sglang.frontend import BASE

QUESTIONS = (
    "What is the price of ticket 417?",
    "What is the weight of package 238?",
    "Which package is private, and what is its price?",
)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the model: its prompt, its answer, and the tokens of the prompt that were in the cache."""

    purpose: str
    adapter: str | None
    prompt: str
    answer: str
    prompt_tokens: int
    cached_tokens: int


def tool(query: str) -> str:
    """Stands for a database: the same query always has the same result."""
    return ("open", "closed", "Jonas", "Hanna", "nothing")[zlib.crc32(query.encode()) % 5]


@sgl.function
def agent(s: Any, questions: tuple[str, ...]) -> list[tuple[str, str]]:
    prompts = []
    for turn, question in enumerate(questions):
        for purpose, text in (("query", question), ("reply", None)):
            said = (
                text
                if text is not None
                else f"The database says: {tool(s[f'query{turn}'])}. Who needs to know?"
            )
            s += f"user: {said}\nassistant:"
            prompts.append((f"{purpose}{turn}", s.text()))
            s += sgl.gen(f"{purpose}{turn}", max_tokens=32, stop="\n")
            s += "\n"
    return prompts


@sgl.function
def once(s: Any, prompt: str) -> None:
    s += prompt
    s += sgl.gen("answer", max_tokens=32, stop="\n")


def work(backend: sgl.RuntimeEndpoint, adapter: str) -> list[Call]:
    """All calls of the agent, in order, and the last one once more on the base model."""
    state = agent.run(QUESTIONS, temperature=0, lora_path=adapter, backend=backend)
    state.sync()
    prompts: list[tuple[str, str]] = state.ret_value
    calls = [_call(state, name, adapter, name, prompt) for name, prompt in prompts]
    base = once.run(prompts[-1][1], temperature=0, lora_path=BASE, backend=backend)
    return [*calls, _call(base, "answer", None, "base model", prompts[-1][1])]


def _call(state: Any, name: str, adapter: str | None, purpose: str, prompt: str) -> Call:
    answer, meta = state[name], state.get_meta_info(name)
    return Call(purpose, adapter, prompt, answer, meta["prompt_tokens"], meta["cached_tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="an SGLang server with the adapter")
    parser.add_argument("--adapter", default="sql", help="name of the agent's adapter on that server")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    options = parser.parse_args()
    calls = work(connect(options.url, [options.adapter]), options.adapter)
    if options.json:
        print(json.dumps([dataclasses.asdict(call) for call in calls], indent=1, ensure_ascii=False))
        return
    print(f"{'call':11} {'prompt':>6} {'cached':>6}  answer")
    for call in calls:
        print(f"{call.purpose:11} {call.prompt_tokens:6} {call.cached_tokens:6}  {call.answer.strip()}")


if __name__ == "__main__":
    main()
