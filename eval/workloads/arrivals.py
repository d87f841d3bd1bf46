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
    duty, drift = on_s / (on_s + off_s), popularity.drift_s or math.inf

    def switched(adapter: int) -> Iterator[tuple[float, int]]:
        rng = random.Random(f"bursts/{seed}/{adapter}")

        def stay() -> float:
            return rng.expovariate(1 / (on_s if on else off_s)) if off_s else math.inf

        on = rng.random() < duty
        switch = stay()
        time, epoch = 0.0, 0
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
                switch = time + stay()

    return heapq.merge(*map(switched, range(adapters)))
