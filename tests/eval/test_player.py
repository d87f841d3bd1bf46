"""The driver of live servers: contents of prompts, open and closed loop, what counts, what a failure does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from support.answering_server import ANSWER, AnsweringServer, answering_server

from elora_sglang.eval.serving import chat, paper_traffic, player
from elora_sglang.eval.workloads.model import Adapter, Header, Piece, Session, Turn, Workload

VOCAB = 500


@pytest.fixture
def server() -> Iterator[AnsweringServer]:
    with answering_server() as running:
        yield running


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


def test_prompts_hold_the_pieces_and_the_real_answers(
    server: AnsweringServer, capsys: pytest.CaptureFixture[str]
) -> None:
    played = player.play(server.url, work(TALK, OTHER), ["x", "y"], vocab=VOCAB, bar="talk")
    answers = {one.key: one for one in played}
    assert set(answers) == {"talk/0", "talk/1", "other/0"} and "3/3" in capsys.readouterr().err
    sent = {len(body["input_ids"]): body for body in server.requests}
    first, second = sent[25]["input_ids"], sent[25 + 2 + 6]["input_ids"]
    assert second[:25] == first and tuple(second[25:27]) == ANSWER
    assert sent[25]["lora_path"] == sent[33]["lora_path"] == "y"
    alone = sent[16]
    assert "lora_path" not in alone
    assert alone["input_ids"][:12] == first[:12], "a shorter piece of one id is the start of a longer one"
    assert alone["input_ids"][12:] != first[12:16]
    assert all(player.FIRST_ID <= token < VOCAB for body in server.requests for token in body["input_ids"])
    assert answers["talk/1"].sent - answers["talk/0"].sent >= 0.05 and answers["other/0"].sent >= 0.1


def test_an_answer_says_what_was_cached_and_how_long_it_took(server: AnsweringServer) -> None:
    (answer, _) = player.play(server.url, work(TALK), ["x", "y"], vocab=VOCAB)
    assert (answer.prompt_tokens, answer.cached_tokens, answer.cached_host) == (25, 12, 2)
    assert answer.output_ids == ANSWER and 0 < answer.ttft < 5 and 0 <= answer.tpot < 5
    assert answer.finished >= answer.sent + answer.ttft


def test_due_is_as_the_simulator_counts() -> None:
    # The second turn of the talk belongs to a session that began at the start.
    assert player.due(work(TALK, OTHER)) == {"talk/0": 0.0, "talk/1": 0.0, "other/0": 0.1}


def answer(ttft: float, prompt: int = 100, cached: int = 0, host: int = 0) -> player.Answer:
    return player.Answer("0/0", 1.0, ttft, 0.02, prompt, cached, host, (1, 2))


def test_a_summary_has_quantiles_rates_and_tiers() -> None:
    found = player.summary([answer(i / 100) for i in range(1, 101)], 50.0)
    assert (found["ttft_p50"], found["ttft_p95"], found["ttft_p99"]) == (0.50, 0.95, 0.99)
    assert found["rate"] == 2.0 and found["requests"] == 100
    tiers = player.summary([answer(1.0, cached=60, host=40), answer(1.0)], 1.0)
    assert tiers["hit_device"] == pytest.approx(0.1) and tiers["hit_host"] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="make the run longer"):
        player.summary([], 1.0)


def test_turns_due_after_the_end_are_not_sent(server: AnsweringServer) -> None:
    played = player.play(server.url, work(TALK, OTHER), ["x", "y"], vocab=VOCAB, until_s=0.04)
    assert [one.key for one in played] == ["talk/0"] and played[0].sent < 0.04


def test_the_open_loop_is_measured_in_steps_too(server: AnsweringServer) -> None:
    lanes = player.lanes_of(work(TALK, OTHER))
    served = player.serve(
        server.url, lanes, ["x", "y"], vocab=VOCAB, steps=[player.Step(1.0, 0.3)], settle=0.08,
        snapshot=lambda: len(server.requests),
    )  # fmt: skip
    (begin,) = served.begins
    assert begin >= 0.08 and served.snapshots == [(2, 3)]
    assert [one.key for one in served.answers if one.sent >= begin] == ["other/0"]


def test_a_failed_request_ends_the_run_with_one_line(server: AnsweringServer) -> None:
    server.refuse = "planted"
    with pytest.raises(
        RuntimeError, match=r"1 requests failed, the first: talk/0: RuntimeError: HTTP 500: pl"
    ):
        player.play(server.url, work(TALK), ["x", "y"], vocab=VOCAB)
    with pytest.raises(RuntimeError, match="HTTP 500: planted"):
        serve(server, [player.Step(20.0, 30.0)])


@pytest.mark.parametrize("name", list(paper_traffic.SCALED))
def test_scaled_workloads_fit_the_evaluation_model(name: str) -> None:
    found = paper_traffic.workload(name, rate=4.0, duration_s=60.0, adapters=6, ranks=(8, 64), seed=1)
    assert [adapter.rank for adapter in found.header.adapters] == [8, 64] * 3
    sessions = list(found.sessions())
    turns = [turn for session in sessions for turn in session.turns]
    assert 100 < len(turns) < 500 and all(session.adapter is not None for session in sessions)
    assert max(turn.answer.tokens for turn in turns) <= 400


# --- the closed loop ------------------------------------------------------------------------------------------------

NAMES = [f"tenant-{i}" for i in range(64)]
LANES = chat.generate("1", 16_000, 650.0)


def serve(server: AnsweringServer, steps: list[player.Step], **changed: Any) -> player.Served:
    options: dict[str, Any] = {"spread": 0.2, "settle": 0.2, "vocab": VOCAB} | changed
    return player.serve(server.url, LANES, NAMES, steps=steps, **options)


def test_every_step_has_its_time_and_its_rate(server: AnsweringServer) -> None:
    taken: list[str] = []

    def snapshot() -> int:
        taken.append("snapshot")
        return len(taken)

    served = serve(server, [player.Step(8.0, 1.5), player.Step(80.0, 1.5)], snapshot=snapshot)
    first, second = served.begins
    assert second - first >= 1.5 + 0.2
    assert served.snapshots == [(1, 2), (3, 4)] and len(taken) == 4
    counts = [sum(begin <= one.sent < begin + 1.5 for one in served.answers) for begin in served.begins]
    assert counts[1] > 2 * counts[0] > 0, counts
    before = {one.key.rpartition("/")[0] for one in served.answers if one.sent < first}
    assert before >= {lane[0].id for lane in LANES}, (
        "the measured time begins after every live session's first answer"
    )


def test_a_turn_holds_the_answers_before_it(server: AnsweringServer) -> None:
    served = serve(server, [player.Step(200.0, 0.5)])
    assert len(served.answers) == len(server.requests)
    later = [one for one in served.answers if not one.key.endswith("/0")]
    prompts = {tuple(body["input_ids"]) for body in server.requests}
    assert later and all(
        any(len(ids) == one.prompt_tokens and ANSWER in itertools.pairwise(ids) for ids in prompts)
        for one in later
    )


def test_hints_go_with_every_request_only_when_asked_for(server: AnsweringServer) -> None:
    serve(server, [player.Step(200.0, 0.3)])
    assert not any("custom_params" in body["sampling_params"] for body in server.requests)
    server.requests.clear()
    serve(server, [player.Step(200.0, 0.3)], hints=True)
    hints = [body["sampling_params"]["custom_params"] for body in server.requests]
    assert {hint["session_id"] for hint in hints} >= {lane[0].id for lane in LANES}
    assert any(hint["session_end"] for hint in hints) and not all(hint["session_end"] for hint in hints)


def test_a_burst_counts_the_turns_after_the_last_first_answer(server: AnsweringServer) -> None:
    answers, seconds = player.burst(server.url, LANES, NAMES, vocab=VOCAB, turns=3)
    assert len(answers) == 3 * len(LANES) and len(server.requests) == 4 * len(LANES)
    assert 0 < seconds < 60
