"""Splits, samples and speeds."""

from __future__ import annotations

import pytest

from elora_sglang.eval.workloads import create, transforms
from elora_sglang.eval.workloads.model import Piece, Session, Turn, Workload, WorkloadError, fault, prompts


def ids(workload: Workload) -> list[str]:
    return [session.id for session in workload.sessions()]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_a_split_is_disjoint_and_complete(share: float) -> None:
    whole = create("chat", duration_s=900.0)
    tuning, held_out = transforms.split(whole, share, seed=7)
    one, other = list(tuning.sessions()), list(held_out.sessions())
    assert not {s.id for s in one} & {s.id for s in other}
    assert sorted([*one, *other], key=lambda s: int(s.id)) == list(whole.sessions()), "as they were, in order"
    assert ids(tuning) == sorted(ids(tuning), key=int)
    assert len(one) / (len(one) + len(other)) == pytest.approx(share, abs=0.04)


def test_splits_are_seeded_and_say_what_they_are() -> None:
    whole = create("chat", duration_s=900.0)
    first = transforms.split(whole, 0.5, 1)
    assert ids(first[0]) == ids(transforms.split(whole, 0.5, 1)[0])
    assert ids(first[0]) != ids(transforms.split(whole, 0.5, 2)[0])
    assert [part.header.parameters["part"] for part in first] == ["tuning", "held-out"]
    assert "part" not in whole.header.parameters


def test_a_sample_is_a_share_of_sessions_and_not_the_split() -> None:
    whole = create("chat", duration_s=900.0)
    third = transforms.sample(whole, 1 / 3, 1)
    assert len(ids(third)) / len(ids(whole)) == pytest.approx(1 / 3, abs=0.04)
    by_id = {session.id: session for session in whole.sessions()}
    assert all(by_id[session.id] == session for session in third.sessions())
    assert ids(third) == ids(transforms.sample(whole, 1 / 3, 1))
    assert ids(third) != ids(transforms.sample(whole, 1 / 3, 2))
    # A sample of a split must not be all or nothing of it.
    tuning, _ = transforms.split(whole, 1 / 3, 1)
    assert len(ids(transforms.sample(tuning, 1 / 3, 1))) / len(ids(tuning)) == pytest.approx(1 / 3, abs=0.06)


def test_speed_divides_arrivals_and_leaves_think_times() -> None:
    whole = create("chat", duration_s=900.0)
    for before, after in zip(whole.sessions(), transforms.faster(whole, 4.0).sessions(), strict=True):
        assert after.start == pytest.approx(before.start / 4, abs=1e-6)
        assert [t.think for t in after.turns] == [t.think for t in before.turns]


@pytest.mark.parametrize("wrong", [-0.1, 1.1, float("nan")])
def test_shares_that_make_no_sense(wrong: float) -> None:
    with pytest.raises(WorkloadError, match="between 0 and 1"):
        transforms.sample(create("chat", duration_s=900.0), wrong)
    with pytest.raises(WorkloadError, match="between 0 and 1"):
        transforms.split(create("chat", duration_s=900.0), wrong)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan")])
def test_speeds_that_make_no_sense(wrong: float) -> None:
    with pytest.raises(WorkloadError, match="speed must be above 0"):
        transforms.faster(create("chat", duration_s=900.0), wrong)


def test_a_workload_that_began_earlier_goes_on_with_what_was_said() -> None:
    whole = create("chat", rate=8.0, duration_s=900.0, think_s=60.0, system_tokens=100)
    late = transforms.since(whole, 300.0)
    before = {session.id: session for session in whole.sessions()}
    found = list(late.sessions())
    assert [s.start for s in found] == sorted(s.start for s in found) and found[0].start >= 0
    assert all(fault(session, len(whole.header.adapters)) is None for session in found)
    under_way = [s for s in found if before[s.id].start < 300]
    assert len(under_way) > 50 and len(found) < len(before)
    for session in found:
        old = before[session.id]
        skipped = len(old.turns) - len(session.turns)
        assert list(prompts(session)) == list(prompts(old))[skipped:], "the same prompts, from some turn on"
        if old.start >= 300:
            assert skipped == 0 and session.start == pytest.approx(old.start - 300)
    assert list(late.sessions()) == found
    # Later on nothing is different: as many turns come by themselves as did before.
    fresh = sum(s.start >= 300 for s in found if before[s.id].start >= 300)
    assert fresh == sum(s.start >= 600 for s in before.values())


def test_a_session_is_cut_where_its_turns_would_have_come() -> None:
    turns = (
        Turn(0, (Piece(1, 10),), Piece(2, 100), at=5.0),
        Turn(2, (Piece(3, 10),), Piece(4, 100), think=10.0),
        Turn(4, (Piece(5, 10),), Piece(6, 100), think=10.0),
    )
    whole = transforms.filtered(create("chat", duration_s=1.0), lambda _: False)
    one = type(whole)(whole.header, lambda: iter([Session("s", None, turns)]))
    # Answers take a second, so turns come at 5, 16 and 27 s.
    for cut, left, first in ((0.0, 3, 5.0), (5.0, 3, 0.0), (6.0, 2, 10.0), (20.0, 1, 7.0)):
        (session,) = transforms.since(one, cut).sessions()
        assert len(session.turns) == left and session.start == pytest.approx(first)
    assert list(transforms.since(one, 28.0).sessions()) == []
    with pytest.raises(WorkloadError, match="cut at 0 seconds or later, got -1"):
        transforms.since(one, -1.0)
