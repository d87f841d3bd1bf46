"""Prompts of the correctness runs: growing multi-turn dialogs, real ones where the traces are at hand.

Turns of one dialog share their prefix and their adapter, so caches hit, split and are evicted.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TRACES = Path(os.environ.get("ELORA_TRACES", Path(__file__).resolve().parents[3] / "shared" / "traces"))


@dataclass(frozen=True)
class Prompt:
    """One greedy job: token ids, adapter name (``None``: base model), tokens to generate."""

    input_ids: tuple[int, ...]
    adapter: str | None
    max_new_tokens: int


def _real_dialogs() -> Iterator[list[str]]:
    path = TRACES / "taskmaster4_dialogs.jsonl"
    if path.exists():
        with path.open() as lines:
            for line in lines:
                yield [f"{speaker}: {text}\n" for speaker, text in json.loads(line)["turns"]]


def _made_up_dialogs(rng: random.Random) -> Iterator[list[str]]:
    nouns = ["ticket", "invoice", "table", "pizza", "contract", "query", "flight", "movie"]
    verbs = ["book", "cancel", "explain", "change", "translate", "order", "find", "check"]
    while True:
        turns = []
        for _ in range(8):
            turns.append(f"user: please {rng.choice(verbs)} the {rng.choice(nouns)} {rng.randrange(1000)}\n")
            turns.append(f"assistant: the {rng.choice(nouns)} is {rng.choice(verbs)}ed\n")
        yield turns


def prompts(
    encode: Callable[[str], list[int]],
    adapters: list[str],
    *,
    count: int,
    seed: int,
    turns_per_dialog: int = 4,
    max_prompt: int = 220,
    max_new_tokens: int = 12,
) -> list[Prompt]:
    """``count`` prompts over all ``adapters`` and the base model; half real dialogs where present.

    Deterministic for a seed. Dialog k belongs to adapter k modulo (adapters + base).
    """
    rng = random.Random(seed)
    owners: list[str | None] = [*adapters, None]
    real, made_up = _real_dialogs(), _made_up_dialogs(rng)
    found: list[Prompt] = []
    dialog = 0
    while len(found) < count:
        turns = next(real, None) if dialog % 2 == 0 else None
        turns = turns or next(made_up)
        owner = owners[dialog % len(owners)]
        ids: list[int] = []
        for turn in range(min(turns_per_dialog, len(turns) // 2)):
            ids = ids + encode("".join(turns[2 * turn : 2 * turn + 2]))
            if len(ids) > max_prompt:
                ids = ids[:max_prompt]
            new = max_new_tokens - dialog % 5
            found.append(Prompt(tuple(ids), owner, new))
            if len(ids) == max_prompt:
                break
        dialog += 1
    found = found[:count]
    rng.shuffle(found)
    return found
