"""Who imports whom, read from the source: every import of every package, in functions and for types alone as well.

Unlike import-linter this follows the folders at the root (``patches/``, ``kernels/``, ``eval/``), which are packages of
``elora_sglang`` by symbolic links, and folders without ``__init__.py``.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

PACKAGE = "elora_sglang"

Graph = dict[str, set[str]]


def sources(root: Path) -> dict[str, Path]:
    """Every module of the package by its full name, those behind symbolic links included."""
    found: dict[str, Path] = {}
    for folder in _folders(root / PACKAGE):
        for path in sorted(folder.glob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _folders(top: Path) -> Iterator[Path]:
    yield top
    for child in sorted(top.iterdir()):
        if child.is_dir() and child.name != "__pycache__":
            yield from _folders(child)


def modules(found: Mapping[str, Path]) -> Graph:
    """Which modules each module imports.

    ``from a import b`` is an import of ``a.b`` where that is a module, else of ``a``. A package's ``__init__`` is the
    package's own name.
    """
    graph: Graph = {name: set() for name in found}
    for name, path in found.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            graph[name].update(imported for imported in _named(node, found) if imported != name)
    return graph


def _named(node: ast.AST, known: Collection[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
        for alias in node.names:
            longer = f"{node.module}.{alias.name}"
            if longer in known:
                yield longer
            elif node.module in known:
                yield node.module


def rooms(graph: Mapping[str, Collection[str]]) -> dict[str, Graph]:
    """For every folder, which of its *rooms* imports which. A room is a file of it, or a folder with all within."""
    packages = {name[:at] for name in graph for at, sign in enumerate(name) if sign == "."}
    found: dict[str, Graph] = {package: {} for package in packages}
    for importer, imports in graph.items():
        for imported in imports:
            folder = _common(importer, imported, packages)
            mine, theirs = _room(importer, folder), _room(imported, folder)
            found[folder].setdefault(theirs, set())
            if mine != theirs:
                found[folder].setdefault(mine, set()).add(theirs)
    return found


def _common(one: str, other: str, packages: Collection[str]) -> str:
    folder = one if one in packages else one.rpartition(".")[0]
    while not (other == folder or other.startswith(folder + ".")):
        folder = folder.rpartition(".")[0]
    return folder


def _room(module: str, folder: str) -> str:
    """The file or folder directly below ``folder`` that the module is in; the folder's own ``__init__``."""
    rest = module.removeprefix(folder).lstrip(".")
    return f"{folder}.{rest.partition('.')[0] or '__init__'}"


def circles(graph: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Groups of more than one node in which everyone reaches everyone (Tarjan, SIAM J. Comput. 1(2), 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def edges(circle: Collection[str], graph: Mapping[str, Collection[str]]) -> set[tuple[str, str]]:
    """The imports that make a circle."""
    return {(one, other) for one in circle for other in graph[one] if other in circle}
