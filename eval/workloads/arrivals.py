"""When sessions arrive: a Poisson process, or one per adapter that is switched on and off."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterator

from elora_sglang.eval.workloads.model import WorkloadError
from elora_sglang.eval.workloads.popularity import Popularity


def poisson(rate: float, duration_s: float, rng: random.Random) -> Iterator[float]:
    """Arrivals in seconds, ``rate`` a second on average, before ``duration_s``; ``rng`` moves on."""
    at = rng.expovariate(rate)
    while at < duration_s:
        yield at
        at += rng.expovariate(rate)


def bursts(
    popularity: Popularity,
    adapters: int,
    *,
    rate: float,
    duration_s: float,
    on_s: float,
    off_s: float,
    seed: int,
) -> Iterator[tuple[float, int]]:
    """(seconds, adapter) of arrivals that are bursty per adapter, ``rate`` a second over all of them on average.

    Every adapter is on and off in turn, for times that are exponential with means ``on_s`` and ``off_s``, and starts
    on with probability on / (on + off). While it is on its arrivals are Poisson, at rate x share / that probability,
    where the share is what :class:`Popularity` gives it at that time. So ``off_s`` = 0 is Poisson, and the larger
    off / on, the harder the bursts. Over a short run the actual rate differs from ``rate``, the more so the more an
    adapter dominates: it may happen to be off for long.
    """
    if not (0 < on_s < math.inf and 0 <= off_s < math.inf):
        raise WorkloadError(f"bursts need on above 0 s and off of at least 0 s, got {on_s:g} and {off_s:g}")
    streams = [
        _switched(
            popularity, adapter, rate, duration_s, on_s, off_s, random.Random(f"bursts/{seed}/{adapter}")
        )
        for adapter in range(adapters)
    ]
    return heapq.merge(*streams)


def _switched(
    popularity: Popularity,
    adapter: int,
    rate: float,
    duration_s: float,
    on_s: float,
    off_s: float,
    rng: random.Random,
) -> Iterator[tuple[float, int]]:
    duty = on_s / (on_s + off_s)
    on = rng.random() < duty
    switch = _stay(rng, on, on_s, off_s)
    time, epoch, drift = 0.0, 0, popularity.drift_s or math.inf
    intensity = rate / duty * popularity.share(adapter, epoch)
    due = rng.expovariate(1.0)  # of the integral of the intensity, until the next arrival
    while time < duration_s:
        end = min(switch, (epoch + 1) * drift, duration_s)
        if on and due < intensity * (end - time):
            time += due / intensity
            due = rng.expovariate(1.0)
            yield time, adapter
            continue
        due -= intensity * (end - time) if on else 0.0
        time = end
        if time >= (epoch + 1) * drift:
            epoch += 1
            intensity = rate / duty * popularity.share(adapter, epoch)
        if time >= switch:
            on = not on
            switch = time + _stay(rng, on, on_s, off_s)


def _stay(rng: random.Random, on: bool, on_s: float, off_s: float) -> float:
    if not off_s:
        return math.inf
    return rng.expovariate(1 / (on_s if on else off_s))
