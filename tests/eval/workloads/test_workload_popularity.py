"""Skew and drift of adapters, and their LoRA ranks, measured."""

from __future__ import annotations

from collections import Counter

import pytest

from elora_sglang.eval.workloads.description import fitted_skew
from elora_sglang.eval.workloads.model import WorkloadError
from elora_sglang.eval.workloads.popularity import Popularity, lora_adapters

DRAWS = 20_000


@pytest.mark.parametrize("skew", [0.0, 0.5, 0.9, 1.2])
@pytest.mark.parametrize("adapters", [20, 200])
def test_use_follows_zipf(skew: float, adapters: int) -> None:
    popularity = Popularity(adapters, skew=skew, drift_s=0, seed=3)
    counts = Counter(popularity.adapter(number, 5.0 * number) for number in range(DRAWS))
    expected = [(rank + 1) ** -skew for rank in range(adapters)]
    order = popularity.order(0)
    for rank in (0, 1, adapters // 2):
        share = expected[rank] / sum(expected)
        assert counts[order[rank]] == pytest.approx(DRAWS * share, abs=5 * (DRAWS * share) ** 0.5)
    # 0.1: sorting makes chance look like skew where adapters are many and alike.
    assert fitted_skew([counts[a] for a in range(adapters)], adapters) == pytest.approx(skew, abs=0.1)


def test_two_thousand_adapters_are_all_drawn() -> None:
    popularity = Popularity(2000, skew=0.0, seed=1)
    assert {popularity.adapter(number, 0.0) for number in range(40_000)} == set(range(2000))


def test_an_adapter_is_a_function_of_seed_session_and_time() -> None:
    one, other = Popularity(100, seed=1), Popularity(100, seed=1)
    asked = [(number, 37.0 * number) for number in range(500)]
    forwards = {key: one.adapter(*key) for key in asked}
    assert forwards == {key: other.adapter(*key) for key in reversed(asked)}, "the order of questions matters"
    assert forwards != {key: Popularity(100, seed=2).adapter(*key) for key in asked}


def test_another_seed_draws_other_places_and_not_only_other_names() -> None:
    drawn = []
    for seed in (1, 2):
        popularity = Popularity(100, drift_s=0, seed=seed)
        place = {adapter: place for place, adapter in enumerate(popularity.order(0))}
        drawn.append([place[popularity.adapter(number, 0.0)] for number in range(100)])
    assert drawn[0] != drawn[1]


def test_drift_redraws_a_share_of_the_ranks_at_each_period_only() -> None:
    popularity = Popularity(200, drift_s=60.0, redraw=0.1, seed=5)
    assert popularity.epoch(59.9) == 0
    assert popularity.epoch(60.0) == 1
    moved = []
    for epoch in range(40):
        before, after = popularity.order(epoch), popularity.order(epoch + 1)
        assert sorted(after) == list(range(200))
        moved.append(sum(a != b for a, b in zip(before, after, strict=True)))
    assert max(moved) <= 20
    assert sum(moved) / len(moved) == pytest.approx(19, abs=1), "of 20 shuffled, one stays on average"
    far = sum(a != b for a, b in zip(popularity.order(0), popularity.order(40), strict=True))
    assert far > 150, "drift adds up"


def test_the_share_of_an_adapter_is_what_sessions_draw() -> None:
    popularity = Popularity(30, skew=0.9, drift_s=60.0, redraw=0.5, seed=6)
    for epoch in (3, 0):
        counts = Counter(popularity.adapter(number, 60.0 * epoch + 1) for number in range(DRAWS))
        for adapter in range(30):
            expected = DRAWS * popularity.share(adapter, epoch)
            assert counts[adapter] == pytest.approx(expected, abs=5 * expected**0.5)


@pytest.mark.parametrize("still", [{"drift_s": 0.0}, {"redraw": 0.0}])
def test_without_drift_nothing_moves(still: dict[str, float]) -> None:
    popularity = Popularity(50, seed=2, **still)
    assert all(popularity.adapter(7, time) == popularity.adapter(7, 0.0) for time in (1.0, 1e4, 1e8))


def test_drift_lowers_the_skew_of_the_whole_run() -> None:
    counts = Counter()
    popularity = Popularity(100, skew=1.0, drift_s=60.0, redraw=0.5, seed=4)
    for number in range(DRAWS):
        counts[popularity.adapter(number, number * 0.6)] += 1  # 200 epochs
    assert fitted_skew([counts[a] for a in range(100)], 100) < 0.5


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"adapters": 0}, "at least 1 adapter"),
        ({"skew": -0.1}, "skew"),
        ({"skew": float("nan")}, "skew"),
        ({"drift_s": -1}, "drift"),
        ({"redraw": 1.5}, "share of ranks"),
    ],
)
def test_parameters_that_make_no_sense(wrong: dict[str, float], why: str) -> None:
    with pytest.raises(WorkloadError, match=why):
        Popularity(**{"adapters": 10, **wrong})


def test_ranks_in_turn_and_by_shares() -> None:
    assert [a.rank for a in lora_adapters(5, "8,16,32", 0)] == [8, 16, 32, 8, 16]
    shared = [a.rank for a in lora_adapters(101, "8:0.5,64:0.25,16:0.25", 0)]
    counts = Counter(shared)
    assert counts[8] in (50, 51)
    assert counts[64] in (25, 26)
    assert sum(counts.values()) == 101
    assert shared != sorted(shared)
    assert shared != [a.rank for a in lora_adapters(101, "8:0.5,64:0.25,16:0.25", 1)]
    assert len({a.name for a in lora_adapters(2000, "8", 0)}) == 2000


@pytest.mark.parametrize(
    "text", ["", "8,x", "0", "8:0.5,16", "8:-1,16:2", "8:0", "8:1:2", "8:nan,16:1", "5000"]
)
def test_ranks_that_cannot_be_read(text: str) -> None:
    with pytest.raises(WorkloadError, match="write 8,16,32"):
        lora_adapters(10, text, 0)
