"""Figures of a simulated run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elora_sglang.eval.support import estimates

if TYPE_CHECKING:
    from elora_sglang.eval.sim.server import Outcome, Server
    from elora_sglang.eval.sim.unified import UnifiedCache


def _percentiles(values: Sequence[float], percents: Sequence[int]) -> list[float]:
    """Interpolated; 0 for no values."""
    shares = [percent / 100 for percent in percents]
    return estimates.quantiles(values, shares, "linear") if values else [0.0] * len(percents)


def _times(values: Sequence[float], percents: Sequence[int]) -> dict[str, float]:
    """Mean and percentiles in seconds, 0 for no values."""
    named = zip(percents, _percentiles(values, percents), strict=True)
    return {"mean": sum(values) / (len(values) or 1), **{f"p{percent}": value for percent, value in named}}


@dataclass
class Gauges:
    """Slots of the device by use, as a mean over time.

    ``look`` is called after each batch; each state counts until the next.
    """

    cache: UnifiedCache
    every_s: float = 2.0
    residents_every_s: float = 5.0

    def __post_init__(self) -> None:
        #: Names of the adapters on the device, by time.
        self.residents: list[tuple[float, list[str]]] = []
        self._last: float | None = None
        self._sums: dict[str, float] = {}
        self._weight = 0.0
        self.samples: list[tuple[float, dict[str, int]]] = []

    def look(self, server: Server) -> None:
        """Note how the device is used now, at most every ``every_s`` seconds."""
        now = server.now
        if self._last is not None and now - self._last < self.every_s:
            return
        usage = self.cache.usage()
        weight = self.every_s if self._last is None else now - self._last
        for name, slots in usage.items():
            self._sums[name] = self._sums.get(name, 0.0) + slots * weight
        self._weight += weight
        self._last = now
        self.samples.append((now, usage))
        if not self.residents or now - self.residents[-1][0] >= self.residents_every_s:
            self.residents.append((now, self.cache.resident_adapters()))

    def means(self) -> dict[str, float]:
        """Mean slots by use."""
        return {name: total / self._weight for name, total in self._sums.items()} if self._weight else {}


def summarize(
    outcome: Outcome, cache: UnifiedCache, gauges: Gauges, warmup_s: float, *, by_arrival: bool = False
) -> dict[str, Any]:
    """Times in seconds, hit rates as shares, bytes; of requests that were due, or arrived, after ``warmup_s``."""
    reqs = [req for req in outcome.ended if (req.arrived if by_arrival else req.due) >= warmup_s]
    ttft = sorted(req.ttft for req in reqs)
    tpot = sorted(req.tpot for req in reqs if req.answer_tokens > 1)
    prompt = sum(req.prompt_tokens for req in reqs) or 1
    adapted = [req for req in reqs if req.adapter is not None]
    usage = gauges.means()
    kv = usage.get("kv", 0.0)
    return {
        "requests": len(reqs),
        "refused": outcome.refused,
        "retractions": outcome.retractions,
        "finished_at": outcome.finished_at,
        "busy": outcome.busy_s / outcome.finished_at if outcome.finished_at else 0.0,
        "ttft": _times(ttft, (50, 95, 99)),
        "tpot": _times(tpot, (99,)),
        "kv_hits": {
            "device": sum(req.device for req in reqs) / prompt,
            "host": sum(req.host for req in reqs) / prompt,
        },
        "adapter_hits": {
            tier: sum(req.adapter_tier == tier for req in adapted) / (len(adapted) or 1)
            for tier in ("device", "host", "disk")
        },
        "restore_s": sum(req.restore_s for req in reqs),
        "bytes": cache.bytes_moved(),
        "usage": usage,
        "invalid_kv": usage.get("invalid", 0.0) / kv if kv else 0.0,
        "counts": cache.manager.counters(),
    }


def series(
    outcome: Outcome, gauges: Gauges, warmup_s: float, *, points: int = 200, adapters: int = 50
) -> dict[str, Any]:
    """What pictures are drawn from: TTFT percentiles 0 to 100 in seconds, device use over time, adapters over time.

    ``residency``: for the ``adapters`` that were there most, one text of 0 and 1 each, a digit per time of
    ``residency_s``.
    """
    ttft = sorted(req.ttft for req in outcome.ended if req.due >= warmup_s)
    samples = gauges.samples[:: max(len(gauges.samples) // points, 1)]
    seen = gauges.residents[:: max(len(gauges.residents) // points, 1)]
    times_there = Counter(name for _, names in seen for name in names)
    most = sorted(times_there, key=lambda name: (-times_there[name], name))[:adapters]
    there = [set(names) for _, names in seen]
    return {
        "ttft_percentiles": [round(seconds, 6) for seconds in _percentiles(ttft, range(101))],
        "memory": {
            "seconds": [round(now, 2) for now, _ in samples],
            **{use: [usage[use] for _, usage in samples] for use in (samples[0][1] if samples else {})},
        },
        "residency_s": [round(now, 2) for now, _ in seen],
        "residency": {name: "".join("01"[name in names] for names in there) for name in most},
    }
