"""Seeded chat of a constant number of live sessions: several turns with think times, one adapter each, by Zipf.

Every adapter has a system prompt that its sessions share. A turn's prompt is the whole conversation so far, the
model's own answers included, plus new words of the user. Where a session ends, another begins in its lane. So the
working set, that is the adapters in use plus the KV of live sessions, is a parameter, and the rate follows from the
think time.
"""

from __future__ import annotations

import functools
import itertools
import random

from elora_sglang.eval.serving.player import Lanes
from elora_sglang.eval.workloads.model import Piece, Session, Turn
from elora_sglang.eval.workloads.popularity import Popularity

SYSTEM_TOKENS, FIRST_TOKENS, TURN_TOKENS = (350, 550), (120, 360), (30, 110)
ANSWER_TOKENS = (6, 14)
TURNS = (4, 8)
ADAPTER_SHARE = 1 / 3  # of the working set
ZIPF = 0.9
SESSIONS = 40  # of a lane


def mean_history() -> float:
    """Mean tokens of a live session that no other session shares, over its turns."""
    first, turn, answer = (sum(bounds) / 2 for bounds in (FIRST_TOKENS, TURN_TOKENS, ANSWER_TOKENS))
    return first + answer + (turn + answer) * (sum(TURNS) / 2 - 1) / 2


def size(working_set_tokens: int, adapter_tokens: float) -> tuple[int, int]:
    """(adapters, live sessions) whose adapters, system prompts and histories fill ``working_set_tokens``.

    ``adapter_tokens``: KV tokens that weigh as much as a mean adapter.
    """
    adapters = max(2, round(working_set_tokens * ADAPTER_SHARE / adapter_tokens))
    kv = working_set_tokens - adapters * (adapter_tokens + sum(SYSTEM_TOKENS) / 2)
    return adapters, max(2, round(kv / mean_history()))


@functools.lru_cache(2)  # all systems get the same
def generate(seed: str, working_set_tokens: int, adapter_tokens: float) -> Lanes:
    """The live sessions of one seed, for the closed loop; the same arguments give the same.

    Times are shares of the mean gap between a lane's turns, of a lane's first turn shares of the time in which the
    lanes come in. The first session of a lane is in its middle: what was said before stands in its first prompt.
    """
    adapters, live = size(working_set_tokens, adapter_tokens)
    rng = random.Random(f"chat/{seed}")
    ids = itertools.count(rng.getrandbits(60))

    def piece(bounds: tuple[int, int]) -> Piece:
        return Piece(next(ids), rng.randint(*bounds))

    systems = [piece(SYSTEM_TOKENS) for _ in range(adapters)]
    weights = Popularity(adapters, skew=ZIPF).shares

    def session(lane: int, number: int) -> Session:
        adapter = rng.choices(range(adapters), weights)[0]
        count = rng.randint(*TURNS)
        over = rng.randrange(count) if number == 0 else 0
        turns: list[Turn] = []
        kept, new = 0, [systems[adapter]]
        for turn in range(count):
            new.append(piece(TURN_TOKENS if turn else FIRST_TOKENS))
            answer, think = piece(ANSWER_TOKENS), min(4.0, rng.expovariate(1.0))
            if turn < over:
                new.append(answer)
                continue
            when = (think, None) if turns else (None, rng.random())
            turns.append(Turn(kept, tuple(new), answer, *when))
            kept, new = kept + len(new) + 1, []
        return Session(f"{lane}/{number}", adapter, tuple(turns))

    return [[session(lane, number) for number in range(SESSIONS)] for lane in range(live)]
