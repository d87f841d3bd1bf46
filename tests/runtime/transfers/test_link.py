"""The link model: bytes over bandwidth, one queue per direction, layer by layer."""

from __future__ import annotations

import pytest

from elora_sglang.runtime.transfers.link import LOAD, SAVE, Link


def test_layers_arrive_one_after_the_other() -> None:
    assert Link(2).issue(LOAD, [2_000_000_000, 0, 1_000_000_000], now=5.0) == [6.0, 6.0, 6.5]


def test_first_in_first_out_per_direction() -> None:
    link = Link(1)
    assert link.issue(LOAD, [10**9, 10**9], now=0.0) == [1.0, 2.0]
    assert link.issue(LOAD, [10**9], now=0.5) == [3.0], "behind the first load"
    assert link.issue(SAVE, [10**9], now=0.5) == [1.5], "the other direction is free"
    assert link.issue(LOAD, [10**9], now=10.0) == [11.0], "an idle link starts at once"


def test_off() -> None:
    link = Link(0)
    assert link.issue(SAVE, [10**12, 1], now=3.0) == [3.0, 3.0]


@pytest.mark.parametrize("gbps", [-1.0, float("nan")])
def test_refuses_nonsense(gbps: float) -> None:
    with pytest.raises(ValueError, match="--elora-link-gbps"):
        Link(gbps)
