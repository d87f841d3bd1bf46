"""Readers on small traces: what they make of them, and what a bad line is answered with."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.trace_samples import AZURE, DIALOGS, MAP, MOONCAKE, TABLE, jsonl

from elora_sglang.eval.workloads import file
from elora_sglang.eval.workloads.model import Piece, Session, Workload, WorkloadError, fault, prompts, tokens
from elora_sglang.eval.workloads.traces import detect, open_trace


@pytest.fixture
def traces(tmp_path: Path) -> dict[str, Path]:
    texts = {"mooncake": jsonl(MOONCAKE), "azure": AZURE, "taskmaster": jsonl(DIALOGS), "columns": TABLE}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return {name: tmp_path / name for name in texts}


def check(workload: Workload) -> list[Session]:
    found = list(workload.sessions())
    assert found == list(workload.sessions()), "read again"
    assert [session.start for session in found] == sorted(session.start for session in found)
    assert len({session.id for session in found}) == len(found)
    for session in found:
        assert fault(session, len(workload.header.adapters)) is None
    json.dumps(dict(workload.header.parameters))
    return found


def test_formats_are_told_by_their_first_line(traces: dict[str, Path], tmp_path: Path) -> None:
    assert {name: detect(path) for name, path in traces.items()} == {
        "mooncake": "mooncake",
        "azure": "azure",
        "taskmaster": "taskmaster",
        "columns": "unknown",
    }
    packed = tmp_path / "m.jsonl.gz"
    packed.write_bytes(gzip.compress(traces["mooncake"].read_bytes()))
    assert detect(packed) == "mooncake"
    assert check(open_trace(packed)) == check(open_trace(traces["mooncake"]))


def test_mooncake_sessions_share_two_blocks_and_keep_what_is_common(traces: dict[str, Path]) -> None:
    found = check(open_trace(traces["mooncake"], adapters=1))
    assert [[turn.at for turn in session.turns] for session in found] == [[0, 3, 4, 5], [0], [1.5], [3]]
    talk = found[0]
    assert [turn.keep for turn in talk.turns] == [0, 2, 4, 2]
    assert talk.turns[0].new == (Piece(0, 512), Piece(1, 512), Piece(2, 476))
    assert talk.turns[2].new == ()
    assert talk.turns[3].new == (Piece(2, 476),), "the same content as at first"
    made = [prompt for session in found for prompt, _ in prompts(session)]
    assert sorted(tokens(prompt) for prompt in made) == sorted(row["input_length"] for row in MOONCAKE)
    answers = [turn.answer for session in found for turn in session.turns]
    assert len({answer.id for answer in answers}) == len(MOONCAKE), "answers are new content"
    assert not {answer.id for answer in answers} & {piece.id for prompt in made for piece in prompt}
    assert [turn.answer.tokens for turn in talk.turns] == [5, 5, 1, 5], "no answer counts as one token"


def test_azure_requests_are_sessions_that_share_nothing(traces: dict[str, Path]) -> None:
    found = check(open_trace(traces["azure"], adapters=0))
    assert [session.start for session in found] == [0.0, pytest.approx(4.314579, abs=1e-6)]
    assert [(s.turns[0].new[0].tokens, s.turns[0].answer.tokens) for s in found] == [(374, 44), (396, 109)]
    assert [session.adapter for session in found] == [None, None]
    assert len({piece.id for s in found for piece in (*s.turns[0].new, s.turns[0].answer)}) == 4


def test_dialogs_are_exchanges_with_think_times(traces: dict[str, Path]) -> None:
    tea, coffee = check(open_trace(traces["taskmaster"], adapters=3, rate=2.0))
    assert [(t.new[0].tokens, t.answer.tokens) for t in tea.turns] == [(round(1.3 * 2), round(1.3 * 4))]
    # An opening and two turns of the user in one prompt; what nobody answers is dropped.
    assert [(t.new[0].tokens, t.answer.tokens) for t in coffee.turns] == [(6, 4), (1, 1)]
    assert [turn.keep for turn in coffee.turns] == [0, 2]
    assert coffee.turns[1].think is not None
    ids = [piece.id for s in (tea, coffee) for t in s.turns for piece in (*t.new, t.answer)]
    assert len(set(ids)) == len(ids)


def test_dialogs_are_repeated_at_the_rate_as_long_as_asked(traces: dict[str, Path]) -> None:
    found = check(open_trace(traces["taskmaster"], rate=3.0, duration_s=2000.0))
    turns = [turn for session in found for turn in session.turns]
    assert len(turns) / 2000 == pytest.approx(3.0, rel=0.06)
    assert len({turn.answer.id for turn in turns}) == len(turns), "repeated dialogs are other content"
    assert check(open_trace(traces["taskmaster"], rate=3.0, duration_s=2000.0, seed=1)) != found


def test_verticals_and_models_name_adapters(traces: dict[str, Path]) -> None:
    dialogs = open_trace(traces["taskmaster"], adapters=0, ranks="8,64")
    assert [(a.name, a.rank) for a in dialogs.header.adapters] == [("Coffee", 8), ("Tea", 64)]
    assert [session.adapter for session in check(dialogs)] == [1, 0]
    table = open_trace(traces["columns"], columns=MAP)
    assert [a.name for a in table.header.adapters] == ["alpha", "beta"]
    assert [session.adapter for session in check(table)] == [0, None, 1]
    drawn = open_trace(traces["columns"], columns=MAP, adapters=7)
    assert len(drawn.header.adapters) == 7
    assert None not in [session.adapter for session in check(drawn)]


def test_a_table_by_its_columns(traces: dict[str, Path], tmp_path: Path) -> None:
    found = check(open_trace(traces["columns"], columns=MAP))
    assert [[turn.at for turn in session.turns] for session in found] == [[0, 2, 8], [1], [4]]
    # 20 + 5 are kept of 50; 20 + 5 + 25 + 5 fit into 58.
    assert [(turn.keep, [p.tokens for p in turn.new]) for turn in found[0].turns] == [
        (0, [20]),
        (2, [25]),
        (4, [3]),
    ]
    assert found[1].turns[0].answer.tokens == 1
    rows = [
        dict(zip(TABLE.splitlines()[0].split(";"), line.split(";"), strict=True))
        for line in TABLE.split()[1:]
    ]
    numbers = [{**row, "ts": int(row["ts"]) / 1000, "in": int(row["in"])} for row in rows]
    (tmp_path / "t.jsonl").write_text(jsonl(numbers))
    assert check(open_trace(tmp_path / "t.jsonl", columns=MAP.replace("unit=ms", "unit=s"))) == found


def test_a_prompt_that_is_shorter_than_its_context_keeps_whole_pieces(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("t,p,a,c\n0,100,10,x\n1,105,10,x\n2,50,10,x\n3,60,1,x\n")
    (session,) = check(open_trace(path, columns="time=t,prompt=p,answer=a,session=c"))
    assert [(turn.keep, [p.tokens for p in turn.new]) for turn in session.turns] == [
        (0, [100]),
        (1, [5]),
        (0, [50]),
        (2, []),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1700000000.25", 1700000000.25),
        ("2023-11-14 22:13:20.25", 1700000000.25),
        ("2023-11-14T22:13:20.2500000Z", 1700000000.25),
        ("2023-11-15 00:13:20+02:00", 1700000000.0),
        ("2023-11-14 16:43:20-0530", 1700000000.0),
    ],
)
def test_times(text: str, expected: float) -> None:
    from elora_sglang.eval.workloads.columns import seconds

    assert seconds(text, "s", Path("x"), 1) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["mooncake", "azure", "taskmaster", "columns"])
def test_adapters_speed_sample_and_preamble_work_on_every_format(
    traces: dict[str, Path], tmp_path: Path, name: str
) -> None:
    rest: dict[str, Any] = {"columns": MAP} if name == "columns" else {}
    plain = check(open_trace(traces[name], adapters=50, **rest))
    fast = check(open_trace(traces[name], adapters=50, speed=2.0, drift_s=0, **rest))
    still = check(open_trace(traces[name], adapters=50, drift_s=0, **rest))
    assert [s.adapter for s in fast] == [s.adapter for s in still]
    for slow, quick in zip(plain, fast, strict=True):
        assert [t.think for t in slow.turns] == [t.think for t in quick.turns]
        assert quick.start == pytest.approx(slow.start / 2, abs=1e-6)
    sampled = check(open_trace(traces[name], adapters=50, sample=0.5, seed=3, **rest))
    whole = {s.id: s for s in check(open_trace(traces[name], adapters=50, seed=3, **rest))}
    assert all(whole[session.id] == session for session in sampled), "who is left keeps adapter and time"
    begun = check(open_trace(traces[name], adapters=50, preamble_tokens=40, **rest))
    for session, before in zip(begun, plain, strict=True):
        pairs = list(zip(prompts(session), prompts(before), strict=True))
        assert all(with_it == (with_it[0], *without) for (with_it, _), (without, _) in pairs)
        assert {with_it[0].tokens for (with_it, _), _ in pairs} == {40}
    shared = {(session.adapter, session.turns[0].new[0].id) for session in begun}
    assert len(shared) == len({adapter for adapter, _ in shared}) == len({number for _, number in shared})


def test_a_saved_workload_is_played_as_it_is(traces: dict[str, Path], tmp_path: Path) -> None:
    made = open_trace(traces["mooncake"], adapters=5, speed=2.0)
    file.write(made, tmp_path / "saved.jsonl")
    again = open_trace(tmp_path / "saved.jsonl")
    assert again.header == made.header
    assert check(again) == check(made)
    assert check(open_trace(tmp_path / "saved.jsonl", speed=2.0))[-1].start == check(made)[-1].start / 2
    for extra in ({"adapters": 3}, {"rate": 1.0}, {"preamble_tokens": 1}):
        with pytest.raises(WorkloadError, match=f"leave {next(iter(extra))} out"):
            open_trace(tmp_path / "saved.jsonl", **extra)
