"""Which adapter a session gets: Zipf over ranks of use, with drift; and which LoRA rank an adapter has.

The share of the adapter that is r-th in use is proportional to r^-skew. Who is r-th is shuffled by the seed, and
then drifts: every ``drift_s`` seconds a share ``redraw`` of the places, drawn by the seed, has its adapters shuffled
among themselves. A session's adapter is a function of (seed, number of the session, time of its first arrival). It is
never drawn for a request: a session that changed its adapter would find none of its KV again.
"""

from __future__ import annotations

import itertools
import math
import random
from array import array
from bisect import bisect_right

from elora_sglang.eval.workloads.draws import uniform
from elora_sglang.eval.workloads.model import Adapter, WorkloadError

MOST_RANK = 1024


class Popularity:
    """Adapters 0 to ``adapters`` - 1 by use. ``drift_s`` = 0 or ``redraw`` = 0: no drift.

    Raises :class:`WorkloadError` on parameters that make no sense. Remembers two orders of adapters per epoch.
    """

    def __init__(
        self, adapters: int, *, skew: float = 0.9, drift_s: float = 600.0, redraw: float = 0.1, seed: int = 0
    ) -> None:
        if adapters < 1:
            raise WorkloadError(f"there must be at least 1 adapter, got {adapters}")
        if not 0 <= skew <= 5:
            raise WorkloadError(f"skew must lie between 0 (all alike) and 5, got {skew:g}")
        if not 0 <= drift_s < math.inf:
            raise WorkloadError(f"drift must be 0 (none) or seconds above 0, got {drift_s:g}")
        if not 0 <= redraw <= 1:
            raise WorkloadError(f"the share of ranks that drift re-draws must lie in [0, 1], got {redraw:g}")
        self.drift_s = drift_s if redraw else 0.0
        self._redrawn = min(adapters, max(2, round(redraw * adapters)))
        self._seed = seed
        weights = [(rank + 1) ** -skew for rank in range(adapters)]
        total = math.fsum(weights)
        self.shares = tuple(weight / total for weight in weights)
        self._until = list(itertools.accumulate(self.shares))
        order = list(range(adapters))
        random.Random(f"popularity/{seed}").shuffle(order)
        self._orders = [array("l", order)]
        self._places: dict[int, array[int]] = {}  # by epoch, the place of each adapter in the order

    def epoch(self, time: float) -> int:
        """How many drifts have happened ``time`` seconds after the start."""
        return int(time // self.drift_s) if self.drift_s else 0

    def order(self, epoch: int) -> array[int]:
        """The adapters by use, the most used first; not to be changed."""
        while len(self._orders) <= epoch:
            order = self._orders[-1][:]
            rng = random.Random(f"popularity/{self._seed}/{len(self._orders)}")
            places = sorted(rng.sample(range(len(order)), self._redrawn))
            adapters = [order[place] for place in places]
            rng.shuffle(adapters)
            for place, adapter in zip(places, adapters, strict=True):
                order[place] = adapter
            self._orders.append(order)
        return self._orders[epoch]

    def adapter(self, session: int, time: float) -> int:
        """The adapter of the session with this number that first arrives ``time`` seconds after the start."""
        draw = uniform("adapter", self._seed, session) * self._until[-1]
        return self.order(self.epoch(time))[min(bisect_right(self._until, draw), len(self._until) - 1)]

    def share(self, adapter: int, epoch: int) -> float:
        """The share of sessions that get ``adapter`` in an epoch."""
        places = self._places.get(epoch)
        if places is None:
            order = self.order(epoch)
            places = self._places[epoch] = array("l", bytes(order.itemsize * len(order)))
            for place, who in enumerate(order):
                places[who] = place
        return self.shares[places[adapter]]


def lora_adapters(count: int, ranks: str, seed: int) -> tuple[Adapter, ...]:
    """``count`` adapters with mixed LoRA ranks, in an order that says nothing of their use.

    ``ranks``: ``8,16,32`` deals them out in turn; ``8:0.5,64:0.5`` gives each its share, shuffled by the seed.
    Raises :class:`WorkloadError` if it cannot be read.
    """
    try:
        parts = [part.split(":") for part in ranks.split(",")]
        values = [int(part[0]) for part in parts]
        shares = [float(part[1]) for part in parts] if len(parts[0]) > 1 else []
        usable = all(1 <= rank <= MOST_RANK for rank in values) and all(
            len(p) == len(parts[0]) for p in parts
        )
        if not usable or len(parts[0]) > 2 or (shares and not (min(shares) >= 0 and sum(shares) > 0)):
            raise ValueError
    except (ValueError, IndexError):
        raise WorkloadError(
            f"LoRA ranks {ranks!r}: write 8,16,32 (in turn) or 8:0.5,64:0.5 (shares), ranks 1 to {MOST_RANK}"
        ) from None
    if shares:
        # The first to fall behind its share is next, so every count is its share to within one.
        due, given = [share / sum(shares) for share in shares], [0] * len(shares)
        for number in range(count):
            behind = [due[i] * (number + 1) - given[i] for i in range(len(due))]
            given[behind.index(max(behind))] += 1
        dealt = [value for value, times in zip(values, given, strict=True) for _ in range(times)]
        random.Random(f"ranks/{seed}").shuffle(dealt)
    else:
        dealt = [values[number % len(values)] for number in range(count)]
    return tuple(Adapter(f"adapter-{number:04}", rank) for number, rank in enumerate(dealt))
