"""The peak load of a system: the highest rate at which the mean time to first token stays below a limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: As in the paper: largest rate with a mean TTFT under 500 ms.
LIMIT_S = 0.5


@dataclass(frozen=True)
class Peak:
    """``rate`` turns a second still met the limit, ``failed`` did not (None: nothing tried failed)."""

    rate: float
    failed: float | None
    tried: tuple[tuple[float, float], ...]


def find(
    mean_ttft: Callable[[float], float],
    start: float,
    *,
    limit_s: float = LIMIT_S,
    precise: float = 0.05,
    stride: float = 2.0,
    least: float = 1e-3,
    most: float = 1e4,
) -> Peak:
    """Bracket by strides up and down from ``start``, then bisect until the bracket is narrower than ``precise``.

    Args:
        mean_ttft: seconds at a rate; asked for about ten rates.
        start: turns a second to begin with; the nearer the fewer runs.
        limit_s: seconds.
        precise: width of the last bracket as a share of its lower end.
        stride: factor between the first two rates; it grows to 2 until there is a bracket.
        least, most: rates beyond which nothing is tried.

    A rate of 0 means that not even ``least`` met the limit. Where TTFT does not rise with the rate everywhere, one
    of the places where it crosses the limit is found.
    """
    tried: list[tuple[float, float]] = []

    def meets(rate: float) -> bool:
        seconds = mean_ttft(rate)
        tried.append((rate, seconds))
        return seconds <= limit_s

    low, high = 0.0, None
    rate, factor = start, stride
    while least <= rate <= most:
        if meets(rate):
            low = rate
            if high is not None:
                break
            rate *= factor
        else:
            high = rate
            if low:
                break
            rate /= factor
        factor = min(factor * factor, max(stride, 2.0))
    while high is not None and low and high > low * (1 + precise):
        middle = (low * high) ** 0.5
        if meets(middle):
            low = middle
        else:
            high = middle
    return Peak(low, high, tuple(tried))
