"""From records to the figures of a table: quantiles, intervals over repeats, paired ratios."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from elora_sglang.eval.serving.drive import Record


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed; raises ValueError on none."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary(records: Sequence[Record], seconds: float) -> dict[str, float]:
    """One run: TTFT and TPOT in seconds, requests a second, and shares of prompt tokens by where they were found."""
    if not records:
        raise ValueError("no request was answered after the warm-up: make the run longer")
    ttft = [r.ttft for r in records]
    prompt = sum(r.prompt_tokens for r in records)
    host = sum(r.cached_host for r in records)
    longer = [r.tpot for r in records if r.tpot > 0]
    return {
        "requests": len(records),
        "rate": len(records) / seconds,
        "ttft_mean": statistics.fmean(ttft),
        "ttft_p50": quantile(ttft, 0.50),
        "ttft_p95": quantile(ttft, 0.95),
        "ttft_p99": quantile(ttft, 0.99),
        "tpot_mean": statistics.fmean(longer) if longer else 0.0,
        "hit_device": (sum(r.cached_tokens for r in records) - host) / prompt,
        "hit_host": host / prompt,
    }


def _student(count: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, count - 1))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 % Student interval (mean, low, high); the interval is infinite for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = _student(len(values)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of paired ratios and its 95 % interval, from the logarithms."""
    mean, low, high = interval([math.log(a / b) for a, b in zip(ours, theirs, strict=True)])
    return math.exp(mean), math.exp(low), math.exp(high) if math.isfinite(high) else math.inf


def differing(
    ours: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]]
) -> tuple[int, int, list[str]]:
    """(answers that differ, answers compared, keys of the first few) among requests that both answered.

    Once an answer differs, the later prompts of its session do, too: only the first of a session is counted and
    what follows is not compared.
    """

    def order(key: str) -> tuple[int, ...]:
        return tuple(int(part) for part in key.split("/"))

    broken: set[str] = set()
    compared, found = 0, []
    for key in sorted(set(ours) & set(theirs), key=order):
        session = key.rpartition("/")[0]
        if session in broken:
            continue
        compared += 1
        if tuple(ours[key]) != tuple(theirs[key]):
            broken.add(session)
            found.append(key)
    return len(found), compared, found[:5]


def pooled(cells: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """One figure of all repeats, in order of the repeats."""
    return [float(cell["summary"][key]) for cell in sorted(cells, key=lambda c: int(c["repeat"]))]
