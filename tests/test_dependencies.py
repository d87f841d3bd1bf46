"""What is imported is declared: by the package, or by the extra whose folder imports it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.release import NAME, ROOT

#: Folder, the extras that it may rely on, and what is first-party there.
FOLDERS: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    **{
        f"{NAME}/{room}": ((), frozenset({NAME}))
        for room in ("core", "runtime", "integration", "platform", "frontend")
    },
    "kernels": ((), frozenset({NAME})),
    "patches": ((), frozenset({NAME})),
    f"{NAME}/demo": (("demo",), frozenset({NAME})),
    "eval": (("eval",), frozenset({NAME})),
    "tests": (
        ("dev",),
        frozenset({NAME, "support", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}),
    ),
    "examples": ((), frozenset({NAME, "connect"})),
}


@cache
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared(*extras: str) -> Iterator[Requirement]:
    """Requirements of the package and of some extras, with the extras that these name."""
    lists = [project()["dependencies"], *(project()["optional-dependencies"][extra] for extra in extras)]
    for requirement in (Requirement(text) for entries in lists for text in entries):
        if canonicalize_name(requirement.name) == canonicalize_name(NAME):
            yield from declared(*requirement.extras)
        else:
            yield requirement


def imported(path: Path) -> Iterator[str]:
    """First names of all modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).partition(".")[0]


@cache
def distributions() -> dict[str, set[str]]:
    """Which installed distributions bring a module, by its first name."""
    return {
        module: {canonicalize_name(name) for name in names}
        for module, names in metadata.packages_distributions().items()
    }


def undeclared(files: list[Path], extras: tuple[str, ...], ours: frozenset[str]) -> list[str]:
    allowed = {canonicalize_name(requirement.name) for requirement in declared(*extras)}
    return sorted(
        f"{path.relative_to(path.anchor)} imports {name}"
        for path in files
        for name in set(imported(path)) - ours - sys.stdlib_module_names
        if not distributions().get(name, {name}) & allowed
    )


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_what_its_extras_declare(folder: str) -> None:
    extras, ours = FOLDERS[folder]
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    assert not undeclared(files, extras, ours)


def test_every_folder_with_code_is_looked_at() -> None:
    """What lies in no folder of the table lies at the head of the package, and needs no extra."""
    links = {f"{NAME}/{link}" for link in ("eval", "kernels", "patches")}
    known = {*FOLDERS, *links, "build", "dist"}
    found = [
        path.relative_to(ROOT) for top in ROOT.iterdir() if top.name[0] != "." for path in top.rglob("*.py")
    ]
    others = [path for path in found if not any(path.is_relative_to(folder) for folder in known)]
    assert {str(path.parent) for path in others} == {NAME}
    assert not undeclared([ROOT / path for path in others], (), frozenset({NAME}))


def test_what_the_server_runs_needs_no_extra() -> None:
    """``demo`` and ``eval`` have extras of their own, so nothing that is installed without them imports them."""
    for folder, (extras, _) in FOLDERS.items():
        if extras or folder == "examples":
            continue
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            assert not re.search(rf"^\s*(from|import) {NAME}\.(demo|eval)\b", text, re.M), path


def test_an_import_that_is_not_declared_is_found(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "def f():\n    import scipy.stats\n    from nowhere_at_all import x\n    import json, torch\n"
    )
    found = undeclared([module], (), frozenset())
    assert [line.rpartition(" ")[2] for line in found] == ["nowhere_at_all", "scipy"]
    assert [line.rpartition(" ")[2] for line in undeclared([module], ("eval",), frozenset())] == [
        "nowhere_at_all"
    ]


def test_the_installed_versions_are_the_declared_ones() -> None:
    for requirement in declared("dev"):
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(metadata.version(requirement.name)), requirement


def test_python_is_what_sglang_needs() -> None:
    assert project()["requires-python"] == metadata.metadata("sglang")["Requires-Python"]
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    minor = project()["requires-python"].rpartition(".")[2]
    assert tool["ruff"]["target-version"] == f"py3{minor}"
    assert tool["mypy"]["python_version"] == f"3.{minor}"
