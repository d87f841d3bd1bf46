"""The predictor of return: acts on traffic with structure, abstains on noise."""

from __future__ import annotations

import random

from support import seeds

from elora_sglang.core.policies.support.return_predictor import (
    HORIZON_S,
    LEAST_ANSWERS,
    MOST_QUESTIONS,
    ReturnPredictor,
)


def feed(predictor: ReturnPredictor, rng: random.Random, rate: dict[str, float], answers: int) -> float:
    """Sessions of one turn per adapter, one a second; a returning one comes back after at most a minute."""
    due: list[tuple[float, object]] = []
    now = 0.0
    for number in range(answers):
        now = float(number)
        adapter = rng.choice(sorted(rate))
        question = predictor.ask(adapter, 1, now)
        if rng.random() < rate[adapter]:
            due.append((now + rng.random() * 60, question))
        for when, asked in [entry for entry in due if entry[0] <= now]:
            predictor.returned(asked, when)  # type: ignore[arg-type]
            due.remove((when, asked))
        predictor.expire(now)
    return now


def test_it_acts_on_two_kinds_of_traffic() -> None:
    predictor = ReturnPredictor()
    feed(predictor, random.Random(3), {"stay": 0.95, "go": 0.05}, 1500)
    stay, go = predictor.predict("stay", 1), predictor.predict("go", 1)
    assert stay is not None and stay > 0.85
    assert go is not None and go < 0.15
    assert predictor.predict("new", 1) is None  # the turn alone says nothing here


def test_it_abstains_on_noise() -> None:
    seed = seeds.draw()
    acted = asked = 0
    for run in range(20):
        predictor = ReturnPredictor()
        rng = random.Random(seed + run)
        names = {f"a{i}": 0.5 for i in range(5)}
        feed(predictor, rng, names, 1200)
        for name in names:
            asked += 1
            acted += predictor.predict(name, 1) is not None
    assert acted <= 2, f"acted on {acted} of {asked} buckets of pure noise"


def test_it_abstains_before_it_has_seen_enough() -> None:
    predictor = ReturnPredictor()
    for number in range(int(LEAST_ANSWERS) // 2):
        predictor.returned(predictor.ask("a", 1, float(number)), float(number))
    predictor.expire(1e6)
    assert predictor.predict("a", 1) is None


def test_it_stops_acting_when_a_bucket_changes_its_ways() -> None:
    predictor = ReturnPredictor()
    rng = random.Random(5)
    end = feed(predictor, rng, {"a": 0.95, "b": 0.05}, 2000)
    assert (predictor.predict("a", 1) or 0) > 0.8
    for number in range(60):  # suddenly nobody comes back
        predictor.ask("a", 1, end + number)
    predictor.expire(end + HORIZON_S + 1000, limit=10_000)
    assert predictor.predict("a", 1) is None


def test_returns_after_the_horizon_do_not_count() -> None:
    predictor = ReturnPredictor()
    question = predictor.ask("a", 1, 0.0)
    predictor.returned(question, HORIZON_S + 1)
    predictor.expire(HORIZON_S + 2)
    assert not question.returned and predictor.base_rate < 0.5


def test_rates_are_not_biased_by_returns_coming_in_first() -> None:
    predictor = ReturnPredictor()
    for number in range(300):  # half come back at once; none of the "no" is known before the horizon
        question = predictor.ask("a", 1, float(number))
        if number % 2:
            predictor.returned(question, float(number))
    assert predictor.base_rate == 0.5
    predictor.expire(HORIZON_S + 100.5)
    assert abs(predictor.base_rate - 0.5) < 0.02


def test_open_questions_are_bounded() -> None:
    predictor = ReturnPredictor()
    for _ in range(MOST_QUESTIONS + 10):
        predictor.ask("a", 1, 0.0)
    assert len(predictor._questions) == MOST_QUESTIONS


def test_turns_fall_into_five_bands() -> None:
    bands = [ReturnPredictor.buckets("a", turns)[1][1] for turns in (1, 2, 3, 4, 5, 8, 9, 10_000)]
    assert bands == [0, 1, 2, 2, 3, 3, 4, 4]
