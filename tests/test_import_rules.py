"""Import rules that import-linter cannot see: it does not follow folders without ``__init__.py``."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import live

PACKAGE = live.ROOT / "elora_sglang"
FOLDERS = ("patches", "kernels", "eval")


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, str(node.module)


def offenders(files: list[Path], *forbidden: str) -> list[str]:
    return [
        f"{path.relative_to(live.ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imported(path)
        if any(name == bad or name.startswith(bad + ".") for bad in forbidden)
    ]


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels", ("sglang", "elora_sglang.integration", "elora_sglang.platform", "elora_sglang.frontend")),
        ("patches", ("sglang", "torch", "elora_sglang.integration", "elora_sglang.runtime")),
    ],
)
def test_a_folder_at_the_root_imports_only_downwards(folder: str, forbidden: tuple[str, ...]) -> None:
    files = sources(live.ROOT / folder)
    assert files
    assert not offenders(files, *forbidden)


def test_the_core_is_standard_library_only() -> None:
    files = sources(PACKAGE / "core")
    allowed = {"elora_sglang"} | set(sys.stdlib_module_names)
    assert not [
        f"{path.name}:{line} imports {name}"
        for path in files
        for line, name in imported(path)
        if name.partition(".")[0] not in allowed
    ]
    assert not offenders(files, "time", "random", "os", "logging", "threading", "secrets", "uuid")


def test_nothing_imports_the_root_folders_by_their_bare_names() -> None:
    everything = [p for top in ("tests", "examples", *FOLDERS) for p in sources(live.ROOT / top)]
    assert not offenders([*everything, *sources(PACKAGE)], *FOLDERS)


def test_only_what_runs_inside_or_beside_sglang_imports_it() -> None:
    allowed = {"integration", "platform", "frontend", "demo", "eval"}
    others = [p for p in sources(PACKAGE) if p.relative_to(PACKAGE).parts[0] not in allowed]
    # The doctor looks at SGLang, and does so only inside its functions.
    others.remove(PACKAGE / "doctor.py")
    assert not offenders(others, "sglang")


def test_test_modules_have_names_of_their_own() -> None:
    """Their folders are no packages: two modules of one name would stop the collection of all tests."""
    names = [path.name for path in sorted((live.ROOT / "tests").rglob("*.py")) if path.name != "__init__.py"]
    assert sorted(set(names)) == sorted(names), sorted(n for n in set(names) if names.count(n) > 1)
