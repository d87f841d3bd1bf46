"""Searching for the peak load: the place where a known curve crosses the limit, in few steps."""

from __future__ import annotations

import math

import pytest

from elora_sglang.eval.sim.peak import find


@pytest.mark.parametrize("capacity", [0.05, 1.0, 3.7, 240.0])
def test_it_finds_where_a_queue_passes_the_limit(capacity: float) -> None:
    def mean_ttft(rate: float) -> float:
        return math.inf if rate >= capacity else 0.05 / (1 - rate / capacity)

    found = find(mean_ttft, 2.0)
    assert found.rate == pytest.approx(0.9 * capacity, rel=0.06) and mean_ttft(found.rate) <= 0.5
    assert found.failed is not None and mean_ttft(found.failed) > 0.5
    assert len(found.tried) < 20


def test_never_and_always() -> None:
    assert find(lambda rate: 9.0, 2.0).rate == 0.0
    always = find(lambda rate: 0.1, 2.0, most=100.0)
    assert always.failed is None and always.rate == 64.0
