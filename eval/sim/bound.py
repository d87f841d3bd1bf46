"""A lower bound on the cost to restore, for any policy: a flow-style relaxation in the manner of PFOO-L.

Between two uses of an object, keeping it where it is saves the cost to bring it back, and takes its size for that
long. No policy can have more slots in use than there are, so none can save more than the most valuable intervals that
fit into *memory x time* as a whole, cut where they no longer fit. What is relaxed: memory is bounded on average only,
the prefix rule and the adapter rule are gone, and running requests take no memory. All of that only lowers it.

Two tiers: an object on the device saves its load; one on either tier saves recomputing it, or reading its
file. So the saving splits into two problems, one for the device and one for both tiers together.

Objects are the blocks of prefixes, and adapters; time is the nominal time of :mod:`.future`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from elora_sglang.core.costs import Costs
from elora_sglang.eval.sim.future import Future


@dataclass(frozen=True)
class Bound:
    """Seconds to restore over the whole workload: at least ``least``; with nothing kept at all, ``most``."""

    least: float
    most: float


def lower_bound(
    future: Future,
    costs: Costs,
    adapter_sizes: dict[str, int],
    *,
    device_slots: int,
    host_slots: int,
    warmup_s: float = 0.0,
) -> Bound:
    """The bound for requests that are due after ``warmup_s``.

    Args:
        costs: per slot, as the policies see them.
        adapter_sizes: slots by adapter.
        device_slots, host_slots: the tiers; host 0: none, and adapters have only their files.
    """
    times, due = (np.frombuffer(one, dtype=np.float64) for one in (future.times, future.due))
    load = costs.slot_bytes / costs.load_bytes_s
    # Intervals between uses: the later use, seconds, slots, seconds to bring it back if no tier has it, or the host.
    intervals: list[tuple[int, float, int, float, float]] = []
    compulsory = 0.0
    for id, uses in future.uses.items():
        recompute = costs.recompute_s(future.depth[id], 1)
        for previous, number in itertools.pairwise((future.born[id], *uses)):
            intervals.append((number, times[number] - times[previous], 1, recompute, min(load, recompute)))
    for name, numbers in future.adapters.items():
        size = adapter_sizes[name]
        if not size:
            continue
        bring = costs.load_s(size)
        read = bring if host_slots else bring + costs.disk_s(size)
        compulsory += bring if due[numbers[0]] >= warmup_s else 0.0
        for previous, number in itertools.pairwise(numbers):
            intervals.append((number, times[number] - times[previous], size, max(read, bring), bring))
    table = np.array(intervals, dtype=np.float64).reshape(-1, 5)
    counted = table[due[table[:, 0].astype(np.int64)] >= warmup_s]
    length, weight, whole, part = counted[:, 1:].T
    # Intervals that end later began when they began: all of the time has room for them.
    span = float(times.max() - times[0]) if len(times) else 0.0
    most = compulsory + float(whole.sum())
    if not host_slots:
        saved = _knapsack(whole, weight * length, device_slots * span)
    else:
        saved = _knapsack(part, weight * length, device_slots * span)
        saved += _knapsack(whole - part, weight * length, (device_slots + host_slots) * span)
    return Bound(max(most - saved, 0.0), most)


def _knapsack(
    value: np.ndarray[tuple[int], np.dtype[np.float64]],
    space: np.ndarray[tuple[int], np.dtype[np.float64]],
    room: float,
) -> float:
    """The largest sum of ``value`` whose ``space`` fits into ``room``, the last piece cut."""
    if math.isinf(room):
        return float(value.sum())
    free = space <= 0
    total = float(value[free].sum())
    value, space = value[~free], space[~free]
    order = np.argsort(-value / space, kind="stable")
    used = np.cumsum(space[order])
    fits = int(np.searchsorted(used, room, side="right"))
    total += float(value[order[:fits]].sum())
    if fits < len(order):
        left = room - (float(used[fits - 1]) if fits else 0.0)
        total += float(value[order[fits]]) * left / float(space[order[fits]])
    return total
