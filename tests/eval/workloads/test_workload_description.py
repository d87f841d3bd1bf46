"""Figures against their meaning, and the command that prints them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from support import workload_samples

from elora_sglang.eval.cli import main
from elora_sglang.eval.workloads import create, file
from elora_sglang.eval.workloads.description import InfiniteCache, fitted_skew, measure
from elora_sglang.eval.workloads.model import Adapter, Header, Piece, Session, Turn, Workload, prompts

HEADER = Header("test", 0, {}, (Adapter("a", 8), Adapter("b", 8)))


def remembered(sessions: list[Session], size: int) -> tuple[int, int, int, int]:
    """(full blocks, found, partial blocks, found), by remembering every prefix of every request."""
    prefixes: dict[int | None, set[tuple[object, ...]]] = {None: set(), 0: set(), 1: set()}
    ends: dict[int | None, set[tuple[object, ...]]] = {None: set(), 0: set(), 1: set()}
    counted = [0, 0, 0, 0]
    for session in sessions:
        known, whole = prefixes[session.adapter], ends[session.adapter]
        for prompt, answer in prompts(session):
            spelled = workload_samples.spelled(prompt)
            for end in range(size, len(spelled) + 1, size):
                counted[0] += 1
                counted[1] += tuple(spelled[:end]) in known
            if len(spelled) % size:
                counted[2] += 1
                counted[3] += tuple(spelled) in whole
                whole.add(tuple(spelled))
            kept = workload_samples.spelled((*prompt, answer))
            known.update(tuple(kept[:end]) for end in range(size, len(kept) + 1, size))
    return counted[0], counted[1], counted[2], counted[3]


@pytest.mark.parametrize("seed", range(10))
def test_an_infinite_cache_finds_what_remembering_everything_finds(seed: int) -> None:
    rng = random.Random(f"cache/{seed}")  # the seed is in the test's name
    size = rng.choice([1, 2, 4, 7])
    sessions = workload_samples.sessions(rng, 60, ids=rng.choice([2, 5]))
    cache = InfiniteCache(size)
    for session in sessions:
        cache.add(session)
    expected = remembered(sessions, size)
    assert (cache.full, cache.full_hits, cache.partial, cache.partial_hits) == expected
    assert 0 < cache.full_hits < cache.full, "both must occur"


def test_the_order_of_sessions_changes_no_count() -> None:
    sessions = workload_samples.sessions(random.Random("order"), 80, ids=3)
    counts = []
    for order in (sessions, sessions[::-1]):
        cache = InfiniteCache(2)
        for session in order:
            cache.add(session)
        counts.append((cache.full, cache.full_hits, cache.partial, cache.partial_hits))
    assert counts[0] == counts[1]


def test_adapters_find_their_own_kv_only() -> None:
    def ask(name: str, adapter: int) -> Session:
        return Session(name, adapter, (Turn(0, (Piece(1, 64),), Piece(9, 1), at=0.0),))

    shared, apart = InfiniteCache(16), InfiniteCache(16)
    for name in "abc":
        shared.add(ask(name, 0))
    for adapter in (0, 1):
        apart.add(ask("x", adapter))
    assert (shared.full, shared.full_hits) == (12, 8)
    assert (apart.full, apart.full_hits) == (8, 0)


def test_measured_figures() -> None:
    first = Session(
        "0",
        0,
        (
            Turn(0, (Piece(1, 30),), Piece(2, 10), at=0.0),
            Turn(2, (Piece(3, 20),), Piece(4, 30), think=5.0),
        ),
    )
    second = Session("1", 1, (Turn(0, (Piece(5, 10),), Piece(6, 20), at=4.0),))
    found = measure(Workload(HEADER, lambda: iter([first, second])), 10)
    assert found is not None
    assert (found.sessions, found.turns, found.span_s) == (2, 3, 4.0)
    assert (found.turn_rate, found.prompt_rate, found.answer_rate) == (0.75, 25.0, 15.0)
    assert (found.prompt.mean, found.prompt.p50, found.prompt.p95, found.prompt.most) == (100 / 3, 30, 60, 60)
    assert found.new.mean == 20
    assert (found.adapters_listed, found.adapters_used) == (2, 2)
    # 3 + 6 + 1 blocks; the second turn finds the first's prompt and answer.
    assert (found.full_blocks, found.full_hit, found.block_hit, found.distinct_tokens) == (10, 0.4, 0.4, 60)
    assert measure(Workload(HEADER, lambda: iter([])), 10) is None


@pytest.mark.parametrize("skew", [0.0, 0.4, 0.9, 1.2])
def test_a_skew_is_found_again(skew: float) -> None:
    counts = [round(1e6 * (rank + 1) ** -skew) for rank in range(100)]
    random.Random("mixed").shuffle(counts)
    assert fitted_skew(counts, 100) == pytest.approx(skew, abs=0.01)


def run(*words: str) -> int:
    return main(["workload", *words])


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("chat", "--duration", "60", "--set", "system_tokens=100") == 0
    out = capsys.readouterr().out
    for words in ("Workload chat, seed 0", "turns a second", "found by an infinite cache", "answer tokens"):
        assert words in out


def test_the_command_writes_what_it_describes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "w.jsonl.gz"
    words = ["--rate", "2", "--duration", "100", "--adapters", "20", "--skew", "1.1", "--drift", "30"]
    assert run("agents", *words, "--seed", "4", "--out", str(path), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    expected = create("agents", rate=2.0, duration_s=100.0, adapters=20, skew=1.1, drift_s=30.0, seed=4)
    found = file.read(path)
    assert found.header == expected.header
    assert list(found.sessions()) == list(expected.sessions())
    assert shown["figures"]["turns"] == sum(len(s.turns) for s in expected.sessions())
    assert shown["parameters"]["skew"] == 1.1
    assert run("--trace", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out) == shown


def test_the_command_takes_parts(capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for words in ([], ["--part", "tuning"], ["--part", "held-out"]):
        run("translation", "--duration", "200", "--json", *words)
        counts.append(json.loads(capsys.readouterr().out)["figures"]["sessions"])
    assert counts[0] == counts[1] + counts[2]
    assert min(counts) > 0


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ([], "give the name of a workload"),
        (["chat", "--trace", "x"], "and not both"),
        (["nothing"], "no workload is called 'nothing'"),
        (["chat", "--speed", "2"], "--speed: for traces only"),
        (["chat", "--set", "turns"], "write NAME=VALUE"),
        (["chat", "--set", "turns=many"], "write NAME=VALUE"),
        (["chat", "--set", "colour=1"], "no parameter 'colour'"),
        (["chat", "--rate", "-1"], "rate must be above 0"),
        (["chat", "--block-tokens", "0"], "argument --block-tokens: '0' is not a whole number of at least 1"),
        (["chat", "--duration", "0.001"], "no sessions"),
        (["--trace", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--trace", "missing.jsonl", "--set", "a=1"], "--set is for generators"),
    ],
)
def test_the_command_answers_mistakes_with_one_line(words: list[str], what: str) -> None:
    with pytest.raises(SystemExit) as raised:
        run(*words)
    assert what in str(raised.value)
    assert str(raised.value).startswith("workload: ")
    assert "\n" not in str(raised.value)
