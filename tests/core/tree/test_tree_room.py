"""The map at the head of ``core/tree`` is true: parts call upwards only, and no policy is known there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from elora_sglang.core import tree

FOLDER = Path(tree.__path__[0])
PARTS = re.findall(r"^``(\w+)`` ", tree.__doc__ or "", re.MULTILINE)
#: What all parts may use.
SHARED = {"node", "candidates", "ranking", "payloads"}


def imported(name: str) -> set[str]:
    """Modules of elora_sglang.core that a file of the room imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())))
    found = {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    prefix = "elora_sglang.core."
    return {module.removeprefix(prefix) for module in found if module.startswith(prefix)}


def test_the_map_names_every_part() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert set(PARTS) | SHARED | {"parts", "checks", "tree"} == files


@pytest.mark.parametrize("name", PARTS)
def test_a_part_calls_only_parts_above_it(name: str) -> None:
    above = PARTS[: PARTS.index(name)]
    assert imported(name) <= {"errors", *(f"tree.{other}" for other in (*above, *SHARED))}


def test_the_tree_knows_no_policy_and_no_owner() -> None:
    for path in FOLDER.glob("*.py"):
        assert all(module == "errors" or module.startswith("tree.") for module in imported(path.stem)), path


def assigned(name: str) -> set[str]:
    """Attributes of other objects than ``self`` that a file assigns to: those of nodes."""
    nodes = ast.walk(ast.parse((FOLDER / f"{name}.py").read_text()))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }  # fmt: skip


def test_no_attribute_of_a_node_is_written_by_two_parts() -> None:
    writers: dict[str, list[str]] = {}
    for name in (*PARTS, "parts", "tree", "checks"):
        for attribute in assigned(name):
            writers.setdefault(attribute, []).append(name)
    # The walk marks the path that access uses.
    assert {a: who for a, who in writers.items() if len(who) > 1} == {"last_tick": ["structure", "access"]}
