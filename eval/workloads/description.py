"""What a workload is like in figures, and what an infinite cache would find of its prompts."""

from __future__ import annotations

import itertools
import statistics
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from elora_sglang.eval.support import estimates
from elora_sglang.eval.workloads.blocks import BlockKeys
from elora_sglang.eval.workloads.model import Session, Workload, prompts, tokens


@dataclass(frozen=True)
class Lengths:
    """Mean and percentiles of lengths in tokens."""

    mean: float
    p50: int
    p95: int
    p99: int
    most: int


@dataclass(frozen=True)
class Description:
    """Counts, lengths in tokens, times in seconds, shares between 0 and 1.

    ``span_s``: from the start to the last arrival that is known, a turn's with a think time is not. ``turn_rate``,
    ``prompt_rate``, ``answer_rate``: turns and tokens a second over the span. ``skew``: see :func:`fitted_skew`.
    ``full_hit``: share of full prompt blocks that a cache which forgets nothing would find, each adapter's KV by
    itself; ``block_hit``: the same with the last, partly filled block of every prompt, found if the same prompt was
    there before; ``distinct_tokens``: in the full blocks that are not found, so what this cache would hold of prompts.
    """

    sessions: int
    turns: int
    span_s: float
    turn_rate: float
    prompt_rate: float
    answer_rate: float
    prompt: Lengths
    new: Lengths
    answer: Lengths
    adapters_listed: int
    adapters_used: int
    skew: float
    block_tokens: int
    full_blocks: int
    full_hit: float
    block_hit: float
    distinct_tokens: int


class InfiniteCache:
    """Counts blocks of prompts that some earlier prompt of the same adapter had, with all before them.

    Which request comes first changes nothing but who finds a block, so sessions may be counted one by one. Answers are
    kept as well: a turn finds the last answer of its own session. Two nodes are taken for one with a probability of
    n^2 / 2^62.
    """

    def __init__(self, block_tokens: int) -> None:
        self.keys = BlockKeys(block_tokens)
        self._nodes: set[int] = set()
        self.full = self.full_hits = self.partial = self.partial_hits = 0

    def add(self, session: Session) -> None:
        """Count all prompts of a session, and remember them."""
        size = self.keys.block_tokens
        path: list[int] = []  # nodes of the last prompt's full blocks
        known, context_tokens = array("q"), 0
        for turn, (prompt, _) in zip(session.turns, prompts(session), strict=True):
            length = tokens(prompt)
            kept = length - tokens(turn.new)
            keys = self.keys.extend(known, min(kept, context_tokens), prompt, partial=True)
            full = length // size
            found = kept // size  # the session's own, the last answer included
            del path[found:]
            node = path[-1] if path else -1 if session.adapter is None else session.adapter
            for key in itertools.islice(keys, len(path), full):
                node = hash((node, key))
                path.append(node)
            fresh = path[found:]
            hits = sum(node in self._nodes for node in fresh)
            self._nodes.update(fresh)
            self.full += full
            self.full_hits += found + hits
            if length % size:
                node = hash((node, keys[-1]))
                self.partial += 1
                self.partial_hits += node in self._nodes
                self._nodes.add(node)
            known, context_tokens = keys, length


def fitted_skew(counts: Sequence[int], adapters: int) -> float:
    """The exponent of the Zipf law over ``adapters`` ranks that makes ``counts``, sorted by size, likeliest.

    Between 0 and 5. Sorting flatters: few sessions over many adapters look skewed when they are not. Over a run with
    drift it is the skew of the whole, which is below that of a moment.
    """
    used = np.sort([count for count in counts if count])[::-1]
    if not len(used) or adapters < 2:
        return 0.0
    logs = np.log(np.arange(1, adapters + 1))
    seen = float(np.average(logs[: len(used)], weights=used))

    def excess(skew: float) -> float:
        return float(np.average(logs, weights=np.exp(-skew * logs))) - seen

    if excess(0.0) <= 0 or excess(5.0) >= 0:
        return 0.0 if excess(0.0) <= 0 else 5.0
    return float(brentq(excess, 0.0, 5.0))


def _lengths(values: array[int]) -> Lengths:
    shares = (0.5, 0.95, 0.99, 1.0)
    return Lengths(statistics.fmean(values), *map(int, estimates.quantiles(values, shares)))


def measure(workload: Workload, block_tokens: int) -> Description | None:
    """The figures of a workload, None if it has no sessions; holds the lengths and the distinct blocks in memory."""
    cache = InfiniteCache(block_tokens)
    prompt, new, answer = array("q"), array("q"), array("q")
    use = [0] * (len(workload.header.adapters) + 1)  # the last: the base model
    sessions, last = 0, 0.0
    for session in workload.sessions():
        sessions += 1
        use[len(use) - 1 if session.adapter is None else session.adapter] += 1
        cache.add(session)
        for turn, (pieces, made) in zip(session.turns, prompts(session), strict=True):
            prompt.append(tokens(pieces))
            new.append(tokens(turn.new))
            answer.append(made.tokens)
            last = max(last, turn.at or 0.0)
    if not sessions:
        return None
    span, full, adapters = last or 1.0, max(1, cache.full), len(workload.header.adapters)
    return Description(
        sessions=sessions, turns=len(prompt), span_s=last, turn_rate=len(prompt) / span,
        prompt_rate=sum(prompt) / span, answer_rate=sum(answer) / span,
        prompt=_lengths(prompt), new=_lengths(new), answer=_lengths(answer),
        adapters_listed=adapters, adapters_used=sum(count > 0 for count in use[:-1]),
        skew=fitted_skew(use[:-1], adapters), block_tokens=block_tokens, full_blocks=cache.full,
        full_hit=cache.full_hits / full,
        block_hit=(cache.full_hits + cache.partial_hits) / max(1, cache.full + cache.partial),
        distinct_tokens=(cache.full - cache.full_hits) * block_tokens,
    )  # fmt: skip
