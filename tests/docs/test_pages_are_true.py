"""What the pages point at is there: links, anchors, paths, modules and flags."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from support.doc_pages import PAGES, ROOT, anchors, code_spans, command_lines, links

from elora_sglang.integration.plugin.config import EloraConfig

#: Folders at the root, and packages of elora_sglang, by which pages name files.
AT_ROOT = ("docs", "examples", "elora_sglang", "eval", "kernels", "patches", "tests", ".github", ".ci")
IN_PACKAGE = ("core", "runtime", "integration", "platform", "frontend", "demo")

_FOLDERS = "|".join(re.escape(name) for name in (*AT_ROOT, *IN_PACKAGE))
_PATH = re.compile(rf"^(?:{_FOLDERS})/[\w./*<>{{}},-]*$")
_MODULE = re.compile(r"python3? -m ((?:elora_sglang|tests)(?:\.\w+)*)")
_FLAG = re.compile(r"--elora-[a-z-]+")


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


def alternatives(path: str) -> list[str]:
    """``a/{b,c}`` is two paths; ``<name>`` stands for any."""
    path = re.sub(r"<[^>]+>", "*", path)
    braces = re.search(r"\{([^}]*)\}", path)
    if braces is None:
        return [path]
    return [path[: braces.start()] + one + path[braces.end() :] for one in braces.group(1).split(",")]


def missing(span: str) -> list[str]:
    """Paths that ``span`` names and that do not exist; nothing if it is no path."""
    if not _PATH.match(span):
        return []
    base = ROOT if span.split("/")[0] in AT_ROOT else ROOT / "elora_sglang"
    return [path for path in alternatives(span) if not list(base.glob(path.rstrip("/")))]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_paths_exist(page: Path) -> None:
    text = page.read_text()
    assert not [path for span in code_spans(text) for path in missing(span)]
    for line in command_lines(text):
        for module in _MODULE.findall(line):
            stem = ROOT / module.replace(".", "/")
            assert stem.with_suffix(".py").is_file() or (stem / "__main__.py").is_file(), line


def test_a_path_that_is_gone_is_found() -> None:
    assert missing("core/no_such_file.py") == ["core/no_such_file.py"]
    assert missing("runtime/{pool,no_such_folder}/") == ["runtime/no_such_folder/"]
    assert not missing("core/policies/<name>.py")
    assert not missing("owner/name")


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_flags_of_ours_exist(page: Path) -> None:
    ours = {"--elora-" + field.name.replace("_", "-") for field in dataclasses.fields(EloraConfig)}
    assert set(_FLAG.findall(page.read_text())) <= ours
