"""The generators: the same from the same seed, in order, at the rate and with the lengths that they say."""

from __future__ import annotations

import random
import statistics
from collections import Counter, defaultdict

import pytest

from elora_sglang.eval.workloads import GENERATORS, create
from elora_sglang.eval.workloads.draws import LogNormal, geometric, uniform
from elora_sglang.eval.workloads.model import (
    Session,
    Workload,
    WorkloadError,
    fault,
    prompts,
    tokens,
)
from elora_sglang.eval.workloads.popularity import Popularity

NAMES = sorted(GENERATORS)


def sessions(workload: Workload) -> list[Session]:
    return list(workload.sessions())


def turns(workload: Workload) -> int:
    return sum(len(session.turns) for session in workload.sessions())


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_says_everything(name: str) -> None:
    made = create(name, seed=1)
    assert sessions(made) == sessions(made), "iterated again"
    assert sessions(made) == sessions(create(name, seed=1))
    assert made.header == create(name, seed=1).header
    assert sessions(made) != sessions(create(name, seed=2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "changed", [{}, {"adapters": 2000, "skew": 1.2, "drift_s": 7.0}, {"adapters": 20, "skew": 0}]
)
def test_sessions_are_sound_and_come_in_order(name: str, changed: dict[str, float]) -> None:
    made = create(name, duration_s=300.0, **changed)
    listed = len(made.header.adapters)
    assert listed == made.header.parameters["adapters"]
    last, ids, names = 0.0, Counter(), set()
    for session in made.sessions():
        assert fault(session, listed) is None
        assert session.adapter is not None
        assert last <= session.start < 300.0
        last = session.start
        names.add(session.id)
        for turn in session.turns:
            own = [piece.id for piece in (*turn.new, turn.answer) if piece.id >= 1 << 20]
            ids.update(own)
            assert len(own) == 2, "new content and an answer, each turn"
            assert all(piece.id in (session.adapter, *own) for piece in turn.new), (
                "another adapter's preamble"
            )
    assert set(ids.values()) == {1}, "an own id stands for one content"
    assert len(names) == len(sessions(made))


def test_generators_stream() -> None:
    endless = create("chat", duration_s=1e12).sessions()
    assert [next(endless).id for _ in range(3)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("name", "parameters", "tolerance"),
    [
        ("chat", {"duration_s": 5000.0}, 0.06),
        # A burst is many requests at once: their number varies the more.
        ("translation", {"duration_s": 5000.0, "skew": 0.5}, 0.1),
        ("agents", {"duration_s": 10_000.0, "skew": 0.5}, 0.1),
        ("burst", {"duration_s": 2000.0}, 0.06),
    ],
)
@pytest.mark.parametrize("rate", [1.0, 6.0])
def test_the_rate_is_kept(name: str, parameters: dict[str, float], tolerance: float, rate: float) -> None:
    made = create(name, rate=rate, seed=1, **parameters)
    assert turns(made) / parameters["duration_s"] == pytest.approx(rate, rel=tolerance)


def test_a_session_has_the_same_lengths_at_any_rate_and_skew() -> None:
    def lengths(workload: Workload) -> list[list[tuple[int, int]]]:
        return [[(t.new[-1].tokens, t.answer.tokens) for t in s.turns] for s in workload.sessions()]

    slow, fast = lengths(create("chat", rate=1.0)), lengths(create("chat", rate=4.0, skew=0.0))
    assert len(slow) > 500
    assert slow == fast[: len(slow)]


def test_chat_has_the_published_means() -> None:
    made = sessions(create("chat", duration_s=10_000.0))
    every = [turn for session in made for turn in session.turns]
    prompt = [turn.new[-1].tokens for turn in every]
    assert len(every) / len(made) == pytest.approx(2.0, rel=0.05)
    assert statistics.fmean(prompt) == pytest.approx(69.5, rel=0.06)
    assert statistics.median(prompt) == pytest.approx(20, rel=0.15)
    assert statistics.fmean(t.answer.tokens for t in every) == pytest.approx(214.5, rel=0.03)
    think = [turn.think for turn in every if turn.think is not None]
    assert statistics.fmean(think) == pytest.approx(160, rel=0.05)
    assert max(t.answer.tokens for t in every) == 1024


@pytest.mark.parametrize("name", ["chat", "agents"])
def test_a_conversation_keeps_all_and_stays_within_the_context(name: str) -> None:
    made = create(name, turns=30.0, context_tokens=3000, duration_s=3000.0)
    cut = 0
    for session in made.sessions():
        pieces = 0
        for number, (turn, (prompt, answer)) in enumerate(zip(session.turns, prompts(session), strict=True)):
            assert turn.keep == pieces
            assert (turn.think is None) == (number == 0)
            assert number == 0 or tokens(prompt) + answer.tokens <= 3000
            pieces = len(prompt) + 1
        cut += tokens((*prompt, answer)) > 2500
    assert cut > 20, "the limit must have been met"


@pytest.mark.parametrize(
    ("name", "setting"), [("chat", {"system_tokens": 300}), ("agents", {}), ("translation", {})]
)
def test_sessions_of_an_adapter_share_their_opening(name: str, setting: dict[str, int]) -> None:
    openings = defaultdict(set)
    for session in create(name, adapters=20, **setting).sessions():
        openings[session.adapter].add(session.turns[0].new[0])
    assert len(openings) == 20
    assert all(len(found) == 1 for found in openings.values())
    assert len(set.union(*openings.values())) == 20


def test_chat_without_a_system_prompt_shares_nothing() -> None:
    assert all(len(session.turns[0].new) == 1 for session in create("chat").sessions())


def dispersion(workload: Workload, adapter: int, window: float, duration: float) -> float:
    """Variance over mean of an adapter's arrivals in windows: 1 for Poisson."""
    counts = [0] * int(duration / window)
    for session in workload.sessions():
        if session.adapter == adapter:
            counts[int(session.start / window)] += 1
    return statistics.variance(counts) / statistics.fmean(counts)


@pytest.mark.parametrize("name", ["translation", "agents"])
def test_arrivals_of_an_adapter_are_bursty_as_far_as_they_are_switched(name: str) -> None:
    shape = {"adapters": 4, "skew": 0.0, "drift_s": 0.0, "duration_s": 3000.0, "rate": 12.0}
    if name == "agents":
        shape["turns"] = 1.0  # as many sessions
    assert dispersion(create(name, **shape), 0, 10.0, 3000.0) > 10
    assert dispersion(create(name, **shape, off_s=0.0), 0, 10.0, 3000.0) == pytest.approx(1, abs=0.4)


def test_bursty_adapters_follow_skew_and_drift() -> None:
    shape = {"skew": 1.0, "drift_s": 10_000.0, "redraw": 1.0}
    halves = [Counter(), Counter()]
    for session in create("translation", adapters=10, duration_s=20_000.0, off_s=20.0, **shape).sessions():
        halves[session.start >= 10_000][session.adapter] += 1
    popularity = Popularity(10, **shape)
    assert popularity.order(0)[0] != popularity.order(1)[0], "with this seed the first changes"
    for epoch, half in enumerate(halves):
        for adapter in popularity.order(epoch)[:3]:
            expected = popularity.share(adapter, epoch)
            assert half[adapter] / sum(half.values()) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("drift_s", [0.0, 5.0])
def test_bursts_are_at_their_rate_from_the_start(drift_s: float) -> None:
    made = create("translation", adapters=1000, skew=0.0, rate=200.0, duration_s=15.0, drift_s=drift_s)
    counts = [0, 0, 0]
    for session in made.sessions():
        counts[int(session.start // 5)] += 1
    assert counts == pytest.approx([1000] * 3, rel=0.15)


def test_the_burst_uses_8_adapters_and_then_16_evenly() -> None:
    made = create("burst", duration_s=1000.0)
    halves = [Counter(), Counter()]
    for session in made.sessions():
        halves[session.start >= 500][session.adapter] += 1
        assert [(t.new[0].tokens, t.answer.tokens) for t in session.turns] == [(4096, 2048)]
    assert sorted(halves[0]) == list(range(8))
    assert sorted(halves[1]) == list(range(16))
    for half in halves:
        mean = sum(half.values()) / len(half)
        assert all(abs(count - mean) < 5 * mean**0.5 for count in half.values())


@pytest.mark.parametrize(
    ("name", "parameters", "what"),
    [
        ("chatt", {}, "there are chat"),
        ("chat", {"turn": 3}, "do you mean turns"),
        ("chat", {"rate": 0}, "rate must be above 0"),
        ("chat", {"duration_s": float("inf")}, "duration_s"),
        ("chat", {"turns": 0.5}, "turns must be at least 1"),
        ("chat", {"system_tokens": -1}, "system_tokens must be at least 0"),
        ("chat", {"prompt_tokens": 4000}, "mean 4000"),
        ("chat", {"ranks": "x"}, "write 8,16,32"),
        ("agents", {"on_s": 0}, "bursts need on above 0"),
        ("agents", {"turns": 0}, "turns must be at least 1"),
        ("translation", {"off_s": -1}, "bursts need on above 0"),
        ("translation", {"instruction_tokens": -1}, "instruction_tokens"),
        ("burst", {"first": 17}, "first must lie between"),
        ("burst", {"adapters": 0}, "at least 1 adapter"),
    ],
)
def test_parameters_that_make_no_sense(name: str, parameters: dict[str, float], what: str) -> None:
    with pytest.raises(WorkloadError, match=what) as raised:
        create(name, **parameters)
    assert "\n" not in str(raised.value)


def test_every_generator_has_its_name_and_a_line() -> None:
    assert NAMES == ["agents", "burst", "chat", "translation"]
    for name, kind in GENERATORS.items():
        assert name == kind.NAME
        assert 10 < len(kind.ABOUT) < 100
        assert kind.__module__.endswith(f".{name}")


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.6])
def test_log_normal_means_hold_with_the_cut(sigma: float) -> None:
    rng = random.Random(f"draws/{sigma}")
    lengths = LogNormal(100.0, sigma, 400.0)
    drawn = [lengths.draw(rng) for _ in range(40_000)]
    assert statistics.fmean(drawn) == pytest.approx(100, rel=0.03)
    assert max(drawn) <= 400


def test_draws() -> None:
    rng = random.Random("geometric")
    assert statistics.fmean(geometric(rng, 3.5) for _ in range(40_000)) == pytest.approx(3.5, rel=0.03)
    assert {geometric(rng, 1.0) for _ in range(100)} == {1}
    drawn = [uniform("x", number) for number in range(10_000)]
    assert statistics.fmean(drawn) == pytest.approx(0.5, abs=0.02)
    assert 0 <= min(drawn) < max(drawn) < 1
    assert uniform("x", 1) == uniform("x", 1) != uniform("y", 1)
