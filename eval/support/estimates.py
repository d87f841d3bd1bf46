"""Statistics of measurements: quantiles, Student intervals, paired ratios. The only module that computes them.

Everything is in the unit of its input. Values may be any sequence of numbers, sorted or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

#: How numpy finds a quantile between two values; ``inverted_cdf`` gives the nearest rank, a value that was measured.
Method = Literal["inverted_cdf", "linear", "higher"]


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval's width."""
        return (self.high - self.low) / 2


def quantile(values: Sequence[float], share: float, method: Method = "inverted_cdf") -> float:
    """The smallest value that at least ``share`` (0..1) of the values do not exceed, or as ``method`` says.

    Raises ValueError for no values.
    """
    return quantiles(values, (share,), method)[0]


def quantiles(
    values: Sequence[float], shares: Sequence[float], method: Method = "inverted_cdf"
) -> list[float]:
    """:func:`quantile` of several shares."""
    if not len(values):
        raise ValueError("no values")
    found: list[float] = np.quantile(np.asarray(values, dtype=np.float64), shares, method=method).tolist()
    return found


def interval(values: Sequence[float]) -> Estimate:
    """Mean and 95 % Student interval over independent repeats; the interval is infinite for one value.

    Raises ValueError for no values.
    """
    if not len(values):
        raise ValueError("no values")
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Estimate(mean, mean - half, mean + half)


def geometric(ratios: Sequence[float]) -> Estimate:
    """Geometric mean of ratios above 0 and its 95 % interval, from their logarithms."""
    return Estimate(*(float(np.exp(value)) for value in interval(np.log(ratios).tolist())))


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Geometric mean of ``ours`` over ``theirs``, pair by pair, and its 95 % interval.

    Raises ValueError where they are not equally many.
    """
    return geometric([one / other for one, other in zip(ours, theirs, strict=True)])
