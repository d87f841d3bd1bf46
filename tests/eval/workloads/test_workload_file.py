"""Saved workloads: round trips, equal bytes, and what a bad file is answered with."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import workload_samples

from elora_sglang.eval.workloads import create, file
from elora_sglang.eval.workloads.model import Adapter, Header, Session, Workload, WorkloadError

HEADER = Header("näme", 3, {"b": 1.5, "a": None, "c": "x"}, (Adapter("one", 8), Adapter("two", 64)))


def workload(seed: int = 0, count: int = 50) -> Workload:
    made = workload_samples.sessions(random.Random(f"file/{seed}"), count)
    return Workload(HEADER, lambda: iter(made))


@pytest.mark.parametrize("name", ["w.jsonl", "w.jsonl.gz"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    file.write(workload(), tmp_path / name)
    found = file.read(tmp_path / name)
    assert found.header == HEADER
    assert list(found.sessions()) == list(workload().sessions())
    assert list(found.sessions()) == list(workload().sessions()), "read again"
    assert [path.name for path in tmp_path.iterdir()] == [name], "nothing else is left"


@pytest.mark.parametrize("name", ["chat", "translation", "agents", "burst"])
def test_generated_workloads_survive_the_file(tmp_path: Path, name: str) -> None:
    made = create(name, duration_s=120.0)
    file.write(made, tmp_path / "w.jsonl")
    found = file.read(tmp_path / "w.jsonl")
    assert found.header == made.header
    assert list(found.sessions()) == list(made.sessions())


def test_equal_workloads_are_equal_files_whatever_their_names(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "a.gz", "b.gz"):
        file.write(workload(), tmp_path / name)
    for kind in ("jsonl", "gz"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert len((tmp_path / "a.gz").read_bytes()) < len((tmp_path / "a.jsonl").read_bytes()) / 2
    assert (tmp_path / "a.gz").read_bytes()[3:8] == bytes(5), "neither a name nor a time"
    for line in (tmp_path / "a.jsonl").read_text().splitlines():
        assert json.dumps(json.loads(line), sort_keys=True, separators=(",", ":"), ensure_ascii=False) == line


def test_reading_and_writing_stream(tmp_path: Path) -> None:
    taken: list[int] = []

    def endless() -> Iterator[Session]:
        for number, session in enumerate(workload().sessions()):
            taken.append(number)
            yield session
        raise WorkloadError("the source ended badly")

    kept = tmp_path / "w.jsonl"
    file.write(workload(), kept)
    before = kept.read_bytes()
    with pytest.raises(WorkloadError, match="ended badly"):
        file.write(Workload(HEADER, endless), kept)
    assert len(taken) == 50
    assert kept.read_bytes() == before, "a failed write leaves the old file"
    assert [path.name for path in tmp_path.iterdir()] == ["w.jsonl"]
    # A fault at the end must not keep the first session from being read.
    kept.write_bytes(before + b"{}\n")
    found = file.read(kept).sessions()
    assert next(found).id == next(workload().sessions()).id
    with pytest.raises(WorkloadError, match=":52:"):
        list(found)


def edited(change: Callable[[dict], object], line: int = 1) -> Callable[[list[str]], list[str]]:
    def edit(lines: list[str]) -> list[str]:
        value = json.loads(lines[line])
        change(value)
        return [*lines[:line], json.dumps(value), *lines[line + 1 :]]

    return edit


def turn(**change: object) -> Callable[[list[str]], list[str]]:
    return edited(lambda session: session["turns"][0].update(change))


@pytest.mark.parametrize(
    ("edit", "where", "what"),
    [
        (lambda lines: [], "", "empty"),
        (lambda lines: lines[1:], ":1:", "not the header"),
        (edited(lambda h: h.update(version=99), 0), ":1:", "version 99"),
        (edited(lambda h: h.pop("seed"), 0), ":1:", "'seed' is missing"),
        (edited(lambda h: h.update(adapters=[["a"]]), 0), ":1:", "broken header"),
        (lambda lines: [*lines[:3], lines[3][:20]], ":4:", "not JSON"),
        (lambda lines: [*lines[:3], "[]"], ":4:", "not a JSON object"),
        (edited(lambda s: s.pop("turns")), ":2:", "'turns' is missing"),
        (edited(lambda s: s.update(turns=[])), ":2:", "no turns"),
        (edited(lambda s: s.update(turns=[3])), ":2:", "not a session"),
        (edited(lambda s: s.update(adapter=2)), ":2:", "adapter 2 is not among the 2"),
        (edited(lambda s: s.update(adapter="one")), ":2:", "an index or null"),
        (turn(at=None), ":2:", "one of at and think"),
        (turn(think=1.0), ":2:", "one of at and think"),
        (turn(at=None, think=1.0), ":2:", "first turn must have at"),
        (turn(at=-1), ":2:", "arrives at -1"),
        (turn(at="soon"), ":2:", "not a number of seconds"),
        (turn(keep=1), ":2:", "keeps 1 pieces of a context of 0"),
        (turn(keep=0.0), ":2:", "whole number"),
        (turn(new=[]), ":2:", "empty prompt"),
        (turn(new=[[1, 0]]), ":2:", "0 tokens"),
        (turn(new=[[1, 2.0]]), ":2:", "two whole numbers"),
        (turn(new=[[2**63, 2]]), ":2:", "id 9223372036854775808"),
        (turn(answer=[1]), ":2:", "not a session"),
        (lambda lines: [lines[0], *reversed(lines[1:])], ":3:", "sort the sessions"),
    ],
)
def test_a_bad_file_gets_one_line(
    tmp_path: Path, edit: Callable[[list[str]], list[str]], where: str, what: str
) -> None:
    path = tmp_path / "w.jsonl"
    file.write(workload(), path)
    path.write_text("\n".join(edit(path.read_text().splitlines())) + "\n")
    with pytest.raises(WorkloadError) as raised:
        list(file.read(path).sessions())
    text = str(raised.value)
    assert text.startswith(f"{path}{where}"), text
    assert what in text
    assert ";" in text, "it says what to do"
    assert "\n" not in text


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="no such file"):
        file.read(tmp_path / "none.jsonl")
    with pytest.raises(WorkloadError, match="cannot be read"):
        file.read(tmp_path)
    broken = tmp_path / "w.gz"
    broken.write_bytes(b"plain")
    with pytest.raises(WorkloadError, match="cannot be read"):
        file.read(broken)
    file.write(workload(), broken)
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(WorkloadError, match="cannot be read"):
        list(file.read(broken).sessions())
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkloadError, match="not UTF-8"):
        file.read(tmp_path / "binary")
    with pytest.raises(WorkloadError, match="cannot be written"):
        file.write(workload(), tmp_path / "no" / "folder.jsonl")
