"""tests/README.md names every room, harness, fixture and marker, and nothing that is gone."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest
from support.release import ROOT

TESTS = ROOT / "tests"


def section(title: str) -> str:
    page = (TESTS / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    return found


def first_column(title: str) -> set[str]:
    """What is in backticks in the first cell of each row of a section's table."""
    cells = re.findall(r"^\|([^|]+)\|", section(title), re.M)
    return {name for cell in cells for name in re.findall(r"`(\w+)[^`]*`", cell)}


def test_every_room_is_in_the_table() -> None:
    rooms = {path.name for path in TESTS.iterdir() if path.is_dir() and path.name[0] not in "._"} - {
        "support"
    }
    named = {
        name
        for row in re.findall(r"\| `[^|]+", section("Where does my test go?"))
        for name in re.findall(r"`(\w+)/", row)
    }
    assert named == rooms


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`(\w+(?:/\w+)*/(?:\w+\.py)?)`", (TESTS / "README.md").read_text())))
)
def test_a_path_on_the_page_is_there(path: str) -> None:
    assert (TESTS / path).exists()


def test_every_harness_has_its_line() -> None:
    assert first_column("Harnesses in `support/`") == {path.stem for path in (TESTS / "support").glob("*.py")}


def test_every_shared_fixture_has_its_line() -> None:
    tree = ast.parse((TESTS / "conftest.py").read_text(encoding="utf-8"))
    fixtures = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("fixture" in ast.unparse(d) for d in node.decorator_list)
    }
    assert first_column("Fixtures of `conftest.py`") == fixtures


def test_every_marker_has_its_line() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"][
        "ini_options"
    ]
    ours = {marker.partition(":")[0] for marker in options["markers"]}
    assert first_column("Markers") == ours | {"timeout"}
