"""One run of several rates: what counts to which step, what a later turn holds, and what a failure does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from elora_sglang.eval import client
from elora_sglang.eval.serving import chat, drive

VOCAB = 500
NAMES = [f"tenant-{i}" for i in range(64)]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[client.Job]]:
    """Jobs in the order in which they were sent; every one is answered at once by tokens 7, 8."""
    jobs: list[client.Job] = []

    async def send(http: Any, url: str, job: client.Job) -> client.Answer:
        jobs.append(job)
        return client.Answer((7, 8), 0.001, 0.001, 0, {})

    monkeypatch.setattr(drive.client, "send", send)
    yield jobs


def serve(steps: list[drive.Step], **changed: Any) -> tuple[drive.Served, list[str]]:
    taken: list[str] = []

    def snapshot() -> int:
        taken.append("snapshot")
        return len(taken)

    work = chat.generate("1", 16_000, 650.0, vocab=VOCAB)
    options: dict[str, Any] = {"spread": 0.2, "settle": 0.2, "seed": "1", "vocab": VOCAB} | changed
    return drive.chat("http://nowhere", work, NAMES, steps=steps, snapshot=snapshot, **options), taken


def test_every_step_has_its_time_and_its_rate(sent: list[client.Job]) -> None:
    steps = [drive.Step(20.0, 1.5), drive.Step(200.0, 1.5)]
    served, taken = serve(steps)
    first, second = served.begins
    assert second - first >= 1.5 + 0.2
    assert served.snapshots == [(1, 2), (3, 4)] and len(taken) == 4
    counts = [sum(begin <= r.sent < begin + 1.5 for r in served.records) for begin in served.begins]
    assert counts[1] > 2 * counts[0] > 0, counts
    assert {r.key.rpartition("/")[0] for r in served.records if r.sent < first} >= {
        f"{lane}/0" for lane in range(len(chat.generate("1", 16_000, 650.0, vocab=VOCAB).lanes))
    }, "the measured time begins after every live session's first answer"


def test_a_turn_holds_the_answers_before_it(sent: list[client.Job]) -> None:
    served, _ = serve([drive.Step(200.0, 0.5)])
    assert len(served.records) == len(sent)
    longer = [
        job for job in sent if any(job.input_ids[i : i + 2] == (7, 8) for i in range(len(job.input_ids)))
    ]
    assert longer, "no second turn was sent"


def test_hints_go_with_every_request_only_when_asked_for(sent: list[client.Job]) -> None:
    serve([drive.Step(200.0, 0.3)])
    assert all(job.params is None for job in sent)
    sent.clear()
    serve([drive.Step(200.0, 0.3)], hints=True)
    assert all(job.params is not None and "session_id" in job.params for job in sent)


def test_a_failed_request_ends_the_run_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def send(http: Any, url: str, job: client.Job) -> client.Answer:
        raise RuntimeError("HTTP 500: planted")

    monkeypatch.setattr(drive.client, "send", send)
    with pytest.raises(RuntimeError, match="HTTP 500: planted"):
        serve([drive.Step(20.0, 30.0)])


def test_a_burst_counts_the_turns_after_the_last_first_answer(sent: list[client.Job]) -> None:
    work = chat.generate("1", 16_000, 650.0, vocab=VOCAB)
    turns, seconds = drive.burst("http://nowhere", work, NAMES, turns=3, seed="1", vocab=VOCAB)
    assert turns == 3 * len(work.lanes) and len(sent) == 4 * len(work.lanes)
    assert 0 < seconds < 60
