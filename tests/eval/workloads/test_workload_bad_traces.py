"""What a trace that cannot be read is answered with: one line that says where and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.trace_samples import AZURE, DIALOGS, MAP, TABLE, jsonl, request

from elora_sglang.eval.workloads.model import WorkloadError
from elora_sglang.eval.workloads.traces import open_trace

GOOD = request(0, 600, [1, 2])


@pytest.mark.parametrize(
    ("text", "settings", "line", "what"),
    [
        (jsonl([GOOD, {**GOOD, "timestamp": "x"}]), {}, 2, "timestamp is 'x'"),
        (jsonl([GOOD, {**GOOD, "timestamp": -1}]), {}, 2, "timestamp is -1"),
        (jsonl([GOOD, {**GOOD, "input_length": 0}]), {}, 2, "input_length is 0"),
        (jsonl([GOOD, {**GOOD, "output_length": True}]), {}, 2, "output_length is True"),
        (jsonl([GOOD, {**GOOD, "hash_ids": [1]}]), {}, 2, "1 hash_ids for 600 tokens"),
        (jsonl([GOOD, {**GOOD, "hash_ids": [1, -2]}]), {}, 2, "whole numbers from 0 on"),
        (jsonl([GOOD]) + "\n[3]\n", {}, 3, "not a JSON object"),
        (jsonl([GOOD]) + '{"timesta', {}, 2, "not JSON"),
        (AZURE + "2023-11-16 18:15:49,1,1\n", {}, 4, "time goes back"),
        (AZURE + "yesterday,1,1\n", {}, 4, "'yesterday' is no time"),
        (AZURE + "2023-13-16 18:15:49,1,1\n", {}, 4, "is no time"),
        (AZURE + "nan,1,1\n", {}, 4, "'nan' is no time"),
        (AZURE + "2023-11-16 18:15:59,1.5,1\n", {}, 4, "ContextTokens is '1.5'"),
        (AZURE + "2023-11-16 18:15:59,0,1\n", {}, 4, "ContextTokens is '0'"),
        (AZURE + "2023-11-16 18:15:59,7,\n", {}, 4, "GeneratedTokens is ''"),
        (AZURE + "2023-11-16 18:15:59,7\n", {}, 4, "2 values for 3 columns"),
        (jsonl([DIALOGS[0], {"turns": 3}]), {}, 2, "no list of turns"),
        (jsonl([DIALOGS[0], {"turns": [["user"]]}]), {}, 2, "is no turn"),
        (jsonl([DIALOGS[0], {"turns": [["robot", "x"]]}]), {}, 2, "speaker 'robot'"),
        (TABLE, {"columns": MAP.replace("in", "inn")}, 2, "no column 'inn'"),
        (TABLE + "1;0;1;z;a\n", {"columns": MAP}, 7, "in is '0'"),
        (TABLE + "1;1;1;x;beta\n", {"columns": MAP}, 7, "changes its adapter from alpha to beta"),
    ],
)
def test_a_bad_line_is_named(
    tmp_path: Path, text: str, settings: dict[str, str], line: int, what: str
) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(WorkloadError) as raised:
        list(open_trace(path, **settings).sessions())
    message = str(raised.value)
    assert message.startswith(f"{path}:{line}: "), message
    assert what in message
    assert ";" in message, "it says what to do"
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "settings", "what"),
    [
        ("", {}, "empty"),
        ("a,b\n1,2\n", {}, "name its columns (a, b)"),
        ('{"x": 1}\n', {}, "name its columns (x)"),
        (AZURE, {"rate": 2.0}, "leave rate and duration out"),
        (AZURE, {"speed": 0}, "speed must be above 0"),
        (AZURE, {"sample": 2}, "between 0 and 1"),
        (AZURE, {"skew": -1}, "skew must"),
        (AZURE, {"preamble_tokens": -1}, "preamble"),
        (TABLE, {"columns": "time=ts"}, "prompt, answer is missing"),
        (TABLE, {"columns": MAP + ",color=x"}, "'color' is no part"),
        (TABLE, {"columns": MAP.replace("=ms", "=h")}, "a known unit is missing"),
        (jsonl(DIALOGS), {"rate": 0.0}, "must be above 0"),
        (jsonl(DIALOGS[2:]), {}, "no dialog with an answer"),
    ],
)
def test_what_cannot_be_opened(tmp_path: Path, text: str, settings: dict[str, Any], what: str) -> None:
    path = tmp_path / "trace"
    path.write_text(text)
    with pytest.raises(WorkloadError) as raised:
        list(open_trace(path, **settings).sessions())
    assert what in str(raised.value)
    assert "\n" not in str(raised.value)
