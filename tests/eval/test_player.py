"""A workload played against a server: the same content is the same tokens, answers come back, times are kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from elora_sglang.eval import client
from elora_sglang.eval.serving import player, scaled
from elora_sglang.eval.workloads.model import Adapter, Header, Piece, Session, Turn, Workload

VOCAB = 500
ANSWER = (7, 8)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[client.Job]]:
    """Jobs in the order in which they were sent; every one is answered at once."""
    jobs: list[client.Job] = []

    async def send(http: Any, url: str, job: client.Job) -> client.Answer:
        jobs.append(job)
        return client.Answer(ANSWER, 0.25, 0.001, len(job.input_ids) // 2, {"device": 3, "host": 2})

    monkeypatch.setattr(player.client, "send", send)
    yield jobs


def work(*sessions: Session) -> Workload:
    return Workload(Header("test", 0, {}, (Adapter("a", 8), Adapter("b", 16))), lambda: iter(sessions))


SHARED = Piece(1, 20)
TALK = Session(
    "talk",
    1,
    (
        Turn(0, (SHARED, Piece(2, 5)), Piece(3, 2), at=0.0),
        Turn(3, (Piece(4, 6),), Piece(5, 2), think=0.05),
    ),
)
OTHER = Session("other", None, (Turn(0, (Piece(1, 12), Piece(9, 4)), Piece(10, 2), at=0.1),))


def test_prompts_hold_the_pieces_and_the_real_answers(sent: list[client.Job]) -> None:
    told: list[int] = []
    records = player.play("http://nowhere", work(TALK, OTHER), ["x", "y"], vocab=VOCAB, told=told.append)
    prompts = {record.key: record for record in records}
    assert set(prompts) == {"talk/0", "talk/1", "other/0"} and told == [1, 2, 3]
    first, second = (next(j for j in sent if len(j.input_ids) == n) for n in (25, 25 + 2 + 6))
    assert second.input_ids[:25] == first.input_ids and second.input_ids[25:27] == ANSWER
    assert first.lora == second.lora == "y"
    alone = next(job for job in sent if job.lora is None)
    assert alone.input_ids[:12] == first.input_ids[:12], (
        "a shorter piece of one id is the start of a longer one"
    )
    assert alone.input_ids[12:] != first.input_ids[12:16]
    assert prompts["talk/1"].sent - prompts["talk/0"].sent >= 0.05 and prompts["other/0"].sent >= 0.1


def test_a_summary_counts_what_was_due_after_the_warm_up(sent: list[client.Job]) -> None:
    sessions = work(TALK, OTHER)
    records = player.play("http://nowhere", sessions, ["x", "y"], vocab=VOCAB)
    due = player.due(sessions)
    whole, late = player.summary(records, due, 0.0), player.summary(records, due, 0.1)
    # The second turn of the talk belongs to a session that began in the warm-up, as in the simulator.
    assert (whole["requests"], late["requests"]) == (3, 1)
    assert late["ttft"]["mean"] == 0.25 and late["kv_hits"] == {"device": (8 - 2) / 16, "host": 2 / 16}
    with pytest.raises(ValueError, match=r"nothing was due after the warm-up of 9 s"):
        player.summary(records, due, 9.0)


def test_turns_due_after_the_end_are_not_sent(sent: list[client.Job]) -> None:
    records = player.play("http://nowhere", work(TALK, OTHER), ["x", "y"], vocab=VOCAB, until_s=0.04)
    assert [record.key for record in records] == ["talk/0"]
    assert player.sent(records)["talk/0"] < 0.04


def test_a_failed_request_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    async def send(http: Any, url: str, job: client.Job) -> client.Answer:
        raise RuntimeError("HTTP 500: planted")

    monkeypatch.setattr(player.client, "send", send)
    with pytest.raises(RuntimeError, match=r"1 requests failed, the first: talk/0: RuntimeError: HTTP 500"):
        player.play("http://nowhere", work(TALK), ["x", "y"], vocab=VOCAB)


@pytest.mark.parametrize("name", scaled.names())
def test_scaled_workloads_fit_the_evaluation_model(name: str) -> None:
    found = scaled.workload(name, rate=4.0, duration_s=60.0, adapters=6, ranks=(8, 64), seed=1)
    assert [adapter.rank for adapter in found.header.adapters] == [8, 64] * 3
    sessions = list(found.sessions())
    turns = [turn for session in sessions for turn in session.turns]
    assert 100 < len(turns) < 500 and all(session.adapter is not None for session in sessions)
    assert max(turn.answer.tokens for turn in turns) <= 400
