"""Seeded chat traffic: sessions of several turns with think times, one adapter each, adapters by Zipf.

Every adapter has a system prompt that its sessions share. A turn's prompt is the whole conversation so far, the
model's own answers included, plus new words of the user; the next turn is sent a think time after the answer came.
Live sessions are constant in number: where one ends, another begins. So the working set, that is the adapters in
use plus the KV of live sessions, is a parameter, and the rate follows from the think time.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

SYSTEM_TOKENS, FIRST_TOKENS, TURN_TOKENS = (350, 550), (120, 360), (30, 110)
ANSWER_TOKENS = (6, 14)
TURNS = (4, 8)
ADAPTER_SHARE = 1 / 3  # of the working set
ZIPF = 0.9
FIRST_ID = 5  # below are the tokenizer's control tokens


@dataclass(frozen=True)
class Turn:
    """What the user adds, how long the answer is, and the think time before it in units of the mean."""

    user: tuple[int, ...]
    answer_tokens: int
    think: float


@dataclass(frozen=True)
class Session:
    """One conversation: adapter index, system prompt, turns. ``skip`` turns have happened before the run began."""

    adapter: int
    system: tuple[int, ...]
    turns: tuple[Turn, ...]
    skip: int = 0

    @property
    def final_tokens(self) -> int:
        """Tokens of the whole conversation."""
        return len(self.system) + sum(len(t.user) + t.answer_tokens for t in self.turns)


@dataclass(frozen=True)
class Workload:
    """``lanes``: one endless sequence of sessions for each live session; ``adapters`` in use; sizes in tokens."""

    lanes: tuple[tuple[Session, ...], ...]
    adapters: int
    working_set_tokens: int
    mean_prompt_tokens: float


def _mean(bounds: tuple[int, int]) -> float:
    return (bounds[0] + bounds[1]) / 2


def mean_history() -> float:
    """Mean tokens of a live session that no other session shares, over its turns."""
    growth = _mean(TURN_TOKENS) + _mean(ANSWER_TOKENS)
    return _mean(FIRST_TOKENS) + _mean(ANSWER_TOKENS) + growth * (_mean(TURNS) - 1) / 2


def size(working_set_tokens: int, adapter_tokens: float) -> tuple[int, int]:
    """(adapters, live sessions) whose adapters, system prompts and histories fill ``working_set_tokens``.

    ``adapter_tokens``: KV tokens that weigh as much as a mean adapter.
    """
    adapters = max(2, round(working_set_tokens * ADAPTER_SHARE / adapter_tokens))
    kv = working_set_tokens - adapters * (adapter_tokens + _mean(SYSTEM_TOKENS))
    return adapters, max(2, round(kv / mean_history()))


def zipf_weights(count: int, exponent: float = ZIPF) -> list[float]:
    """Shares of use of ``count`` adapters, the most used first."""
    weights = [1 / (rank + 1) ** exponent for rank in range(count)]
    return [weight / sum(weights) for weight in weights]


def generate(
    seed: str, working_set_tokens: int, adapter_tokens: float, *, vocab: int, sessions: int = 40
) -> Workload:
    """The traffic of one seed; the same arguments give the same traffic. ``sessions``: how many per lane."""
    adapters, live = size(working_set_tokens, adapter_tokens)
    rng = random.Random(f"chat/{seed}")

    def words(bounds: tuple[int, int]) -> tuple[int, ...]:
        return tuple(rng.randrange(FIRST_ID, vocab) for _ in range(rng.randint(*bounds)))

    systems = [words(SYSTEM_TOKENS) for _ in range(adapters)]
    weights = zipf_weights(adapters)

    def session(first: bool) -> Session:
        adapter = rng.choices(range(adapters), weights)[0]
        turns = tuple(
            Turn(
                words(TURN_TOKENS if turn else FIRST_TOKENS),
                rng.randint(*ANSWER_TOKENS),
                min(4.0, rng.expovariate(1.0)),
            )
            for turn in range(rng.randint(*TURNS))
        )
        return Session(adapter, systems[adapter], turns, rng.randrange(len(turns)) if first else 0)

    lanes = tuple(tuple(session(number == 0) for number in range(sessions)) for _ in range(live))
    prompts = [
        len(s.system) + sum(len(t.user) + t.answer_tokens for t in s.turns[:at]) + len(s.turns[at].user)
        for s in itertools.chain(*lanes)
        for at in range(len(s.turns))
    ]
    return Workload(lanes, adapters, working_set_tokens, sum(prompts) / len(prompts))


def stand_in(seed: str, count: int, vocab: int) -> tuple[int, ...]:
    """Seeded tokens in the place of answers that were given before the run began."""
    rng = random.Random(f"answer/{seed}")
    return tuple(rng.randrange(FIRST_ID, vocab) for _ in range(count))


def opening(session: Session, seed: str, vocab: int) -> list[int]:
    """The conversation of a session up to the first turn that is sent, without that turn's own words."""
    tokens = list(session.system)
    for number, turn in enumerate(session.turns[: session.skip]):
        tokens += [*turn.user, *stand_in(f"{seed}/{number}", turn.answer_tokens, vocab)]
    return tokens


def mean_adapter_tokens(sizes: Sequence[int], kv_bytes_per_token: int) -> float:
    """Mean size of adapters (bytes) in KV tokens."""
    return sum(sizes) / len(sizes) / kv_bytes_per_token
