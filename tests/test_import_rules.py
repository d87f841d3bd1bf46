"""Import rules over all packages, and folders that say why they are large."""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import import_graph, import_rules, live

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


def circular_imports(root: Path) -> set[tuple[str, str]]:
    """Imports that are part of a circle of modules, or of files and folders of one folder."""
    modules = import_graph.modules(import_graph.sources(root))
    graphs = [modules, *import_graph.rooms(modules).values()]
    return {e for graph in graphs for c in import_graph.circles(graph) for e in import_graph.edges(c, graph)}


def test_no_circles_of_modules_or_rooms() -> None:
    found = import_graph.sources(live.ROOT)
    assert {name.split(".")[1] for name in found if "." in name} >= {"core", "integration", *FOLDERS}
    assert circular_imports(live.ROOT) == set()


PLANTED = {
    "modules": {"core/a.py": "from elora_sglang.core import b", "core/b.py": "import elora_sglang.core.a"},
    "in a function": {
        "core/a.py": "def f() -> None:\n    from elora_sglang.core import b",
        "core/b.py": "import elora_sglang.core.a",
    },
    "for types alone": {
        "core/a.py": "if TYPE_CHECKING:\n    from elora_sglang.core.b import B",
        "core/b.py": "from elora_sglang.core.a import A",
    },
    "rooms, with no circle of modules": {
        "core/a.py": "import elora_sglang.kernels.c",
        "kernels/c.py": "",
        "kernels/d.py": "from elora_sglang.core import b",
        "core/b.py": "",
    },
    "behind a symbolic link": {"eval/a.py": "import elora_sglang.core.b", "core/b.py": "import elora_sglang.eval.d",
                               "eval/d.py": ""},
}  # fmt: skip


@pytest.mark.parametrize("planted", PLANTED.values(), ids=list(PLANTED))
def test_a_planted_circle_is_found(planted: dict[str, str], tmp_path: Path) -> None:
    package = tmp_path / "elora_sglang"
    package.mkdir()
    (tmp_path / "outside").mkdir()
    (package / "eval").symlink_to(tmp_path / "outside")
    for name, text in planted.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(text + "\n")
    assert circular_imports(tmp_path)
    first = next(iter(planted))
    (package / first).write_text("")  # its only import away: the circle is gone
    assert not circular_imports(tmp_path)


def test_import_linter_sees_every_package(tmp_path: Path) -> None:
    """The rules hold on a copy with plain folders, and a broken one is named, wherever it is broken."""
    files = import_rules.copy_with_real_folders(tmp_path)
    assert files >= len(import_graph.sources(live.ROOT))
    status, said = import_rules.lint(tmp_path, files)
    assert status == 0, said
    for file, line, names in (
        ("runtime/ticks.py", "import elora_sglang.eval.reporting", "elora_sglang.runtime.ticks"),
        (
            "kernels/page_copy/rows.py",
            "from elora_sglang.runtime import ticks",
            "elora_sglang.kernels.page_copy",
        ),
        ("patches/base.py", "from elora_sglang.core import costs", "elora_sglang.patches.base"),
    ):
        path = tmp_path / "elora_sglang" / file
        before = path.read_text()
        path.write_text(f"{before}\nif TYPE_CHECKING:\n    {line}\n")
        status, said = import_rules.lint(tmp_path, files)
        path.write_text(before)
        assert status != 0 and names in said, (file, said)


#: More Python files than this in one folder need a reason.
MOST_FILES = 12

REASON = re.compile(r"[Mm]any files[^.]*\bbecause\b[^.]{20,}\.")


def large_folders(root: Path) -> list[Path]:
    """Folders with more Python files than that; those behind symbolic links by their real place."""
    files = [p for top in ("elora_sglang", "tests", *FOLDERS) for p in (root / top).rglob("*.py")]
    counts = Counter(path.parent.resolve() for path in files)
    return sorted(folder for folder, count in counts.items() if count > MOST_FILES)


def reason(folder: Path) -> str | None:
    """The sentence of the folder's README or ``__init__`` docstring that says why it has so many files."""
    texts = [file.read_text() for file in (folder / "README.md",) if file.exists()]
    if (folder / "__init__.py").exists():
        texts.append(ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or "")
    found = next(filter(None, (REASON.search(" ".join(text.split())) for text in texts)), None)
    return None if found is None else found[0]


def test_a_large_folder_says_why() -> None:
    large = large_folders(live.ROOT)
    assert live.ROOT / "elora_sglang/core/policies" in large and live.ROOT / "eval/sim" in large
    assert not [str(folder.relative_to(live.ROOT)) for folder in large if reason(folder) is None]


def test_a_reason_is_a_sentence_that_gives_one(tmp_path: Path) -> None:
    for text in ("", "Many files.", "Many files because of it.", "Twenty modules, because each is a policy."):
        (tmp_path / "README.md").write_text(text)
        assert reason(tmp_path) is None
    (tmp_path / "README.md").write_text(
        "# A\n\nMany files, because each\npolicy is read alone, beside its paper.\n"
    )
    assert reason(tmp_path) is not None


def test_test_modules_have_names_of_their_own() -> None:
    """Their folders are no packages: two modules of one name would stop the collection of all tests."""
    names = [path.name for path in sorted((live.ROOT / "tests").rglob("*.py")) if path.name != "__init__.py"]
    assert sorted(set(names)) == sorted(names), sorted(n for n in set(names) if names.count(n) > 1)
