"""A router: each turn of a conversation is answered by the adapter that suits it.

    python examples/router.py --url http://127.0.0.1:30000                # the base model picks, with select
    python examples/router.py --url http://127.0.0.1:30000 --rule words   # a keyword rule picks

The whole conversation is one program. It asks in a side branch, so that the routing question does not become
part of the conversation, and answers with ``gen(..., lora_path=...)``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import sglang as sgl
from connect import connect

from elora_sglang.frontend import BASE

DESKS = {  # adapter: words that call for it
    "sql": ("status", "price", "owner", "number"),
    "french": ("French", "Paris"),
    "legal": ("contract", "license", "sign"),
    "support": ("broken", "repair", "cancel"),
}
QUESTIONS = (
    "What is the status of order 603?",
    "How do I repair the broken engine at the museum?",
    "Can you sign contract 882 before Friday?",
    "What is the owner of room 119?",
)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn: what was asked, who answered from which prompt, and how much of it was in the cache."""

    question: str
    adapter: str
    prompt: str
    answer: str
    prompt_tokens: int
    cached_tokens: int


def by_words(question: str) -> str:
    """The first desk one of whose words is in the question; else the first desk."""
    return next(
        (desk for desk, words in DESKS.items() if any(w in question for w in words)), next(iter(DESKS))
    )


@sgl.function
def conversation(s: Any, questions: Sequence[str], rule: str) -> list[Turn]:
    turns = []
    for number, question in enumerate(questions):
        s += f"user: {question}\nassistant:"
        prompt = s.text()
        if rule == "select":
            with s.copy() as router:
                router += " This is for our desk of"
                router += sgl.select(f"desk{number}", [f" {desk}" for desk in DESKS], lora_path=BASE)
                adapter = router[f"desk{number}"].strip()
        else:
            adapter = by_words(question)
        s += sgl.gen(f"answer{number}", max_tokens=32, temperature=0, stop="\n", lora_path=adapter)
        answer, meta = s[f"answer{number}"], s.get_meta_info(f"answer{number}")
        s += "\n"
        turns.append(Turn(question, adapter, prompt, answer, meta["prompt_tokens"], meta["cached_tokens"]))
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="an SGLang server with the adapters")
    parser.add_argument("--rule", choices=("select", "words"), default="select", help="who picks the adapter")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the text")
    options = parser.parse_args()
    backend = connect(options.url, DESKS)
    turns = conversation.run(QUESTIONS, options.rule, backend=backend).ret_value
    if options.json:
        print(json.dumps([dataclasses.asdict(turn) for turn in turns], indent=1, ensure_ascii=False))
        return
    for turn in turns:
        print(f"user       {turn.question}")
        print(f"{turn.adapter:10} {turn.answer.strip()}")
        print(
            f"{'':10} ({turn.prompt_tokens} tokens, {turn.cached_tokens} of them in this adapter's cache)\n"
        )


if __name__ == "__main__":
    main()
