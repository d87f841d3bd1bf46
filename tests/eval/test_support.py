"""Estimates against textbook values and the definitions in words; argument types."""

from __future__ import annotations

import argparse
import math
import random
import statistics

import pytest

from elora_sglang.eval.support import arguments, estimates

#: Student's t at 97.5 % by degrees of freedom, from a printed table.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 9: 2.262, 29: 2.045}


def _draws(count: int) -> list[float]:
    rng = random.Random(count)
    return [rng.lognormvariate(0.0, 1.0) for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 101, 1000])
@pytest.mark.parametrize("share", [0.5, 0.95, 0.99, 1.0])
def test_a_quantile_is_the_smallest_value_that_so_many_do_not_exceed(count: int, share: float) -> None:
    values = _draws(count)
    enough = [v for v in values if sum(w <= v for w in values) >= share * count]
    assert estimates.quantile(values, share) == min(enough)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_a_linear_quantile_lies_between_its_two_neighbours_as_its_place_does(count: int) -> None:
    ordered = sorted(_draws(count))
    for percent in range(101):
        place = percent / 100 * (count - 1)
        low = int(place)
        high = min(low + 1, count - 1)
        expected = ordered[low] + (ordered[high] - ordered[low]) * (place - low)
        assert estimates.quantile(ordered, percent / 100, "linear") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("degrees", sorted(STUDENT))
def test_an_interval_is_students(degrees: int) -> None:
    values = _draws(degrees + 1)
    half = STUDENT[degrees] * statistics.stdev(values) / math.sqrt(degrees + 1)
    found = estimates.interval(values)
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.half_width == pytest.approx(half, rel=2e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_one_value_says_nothing_of_its_interval_and_none_says_nothing() -> None:
    assert estimates.interval([2.0]) == (2.0, -math.inf, math.inf)
    assert estimates.geometric([2.0]) == (2.0, 0.0, math.inf)
    for nothing in (estimates.interval, lambda values: estimates.quantile(values, 0.5)):
        with pytest.raises(ValueError, match="no values"):
            nothing([])


def test_paired_ratios_are_averaged_by_their_logarithms() -> None:
    found = estimates.paired_ratio([2.0, 1.0], [1.0, 2.0])
    assert found.mean == pytest.approx(1.0)
    assert found.low * found.high == pytest.approx(1.0)
    logs = [math.log(2), -math.log(2)]
    assert math.log(found.high) == pytest.approx(STUDENT[1] * statistics.stdev(logs) / math.sqrt(2), rel=1e-4)
    with pytest.raises(ValueError):
        estimates.paired_ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (arguments.numbers, "0.5, 4,inf", (0.5, 4.0, math.inf)),
        (arguments.positives, "2,0.5", (2.0, 0.5)),
        (arguments.counts, "32,8,32", (32, 8, 32)),
        (arguments.sizes, "1000,10,1000", (10, 1000)),
        (arguments.share, "1", 1.0),
        (arguments.names(["lru", "elora"]), "elora,lru,elora,", ("elora", "lru")),
    ],
)
def test_argument_types_read_what_is_meant(kind: object, text: str, value: object) -> None:
    assert callable(kind) and kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (arguments.numbers, "0.5,x", "'x'"),
        (arguments.numbers, "-1", "'-1'"),
        (arguments.numbers, "nan", "'nan'"),
        (arguments.numbers, "", "''"),
        (arguments.positive, "0", "above 0"),
        (arguments.positives, "1,inf", "finite"),
        (arguments.counts, "1.5", "whole"),
        (arguments.counts, "0", "whole"),
        (arguments.share, "1.1", "between 0 and 1"),
        (arguments.names(["lru", "elora"]), "elora,lrru", "no lrru; there are: lru, elora"),
        (arguments.names(["lru"]), ",", "there are: lru"),
    ],
)
def test_argument_types_say_what_is_wrong(kind: object, text: str, said: str) -> None:
    assert callable(kind)
    with pytest.raises(argparse.ArgumentTypeError, match=said):
        kind(text)
