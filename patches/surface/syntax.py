"""Small questions about syntax trees, of which any reader of source has the same."""

from __future__ import annotations

import ast
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def without_collection(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function without garbage collection: syntax trees are many objects that all stay, and looking for
    garbage among them takes twice as long as making them."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        was = gc.isenabled()
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            if was:
                gc.enable()

    return run


@dataclasses.dataclass(eq=False)
class Import:
    """A name bound by an import: ``module``, or ``name`` of ``module``."""

    module: str
    name: str | None = None
    typing_only: bool = False


def imports(
    name: str, is_package: bool, node: ast.Import | ast.ImportFrom, typing_only: bool = False
) -> Iterator[tuple[str, Import]]:
    """Names that an import statement in the module ``name`` binds, with what they stand for."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.asname:
                yield alias.asname, Import(alias.name, None, typing_only)
            else:
                yield alias.name.partition(".")[0], Import(alias.name.partition(".")[0], None, typing_only)
        return
    base = node.module or ""
    if node.level:
        parts = name.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        base = ".".join([*parts, *([node.module] if node.module else [])])
    for alias in node.names:
        yield alias.asname or alias.name, Import(base, alias.name, typing_only)


def statements(body: Iterable[ast.stmt], typing_only: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Statements of a body and of the ``if``, ``try`` and ``with`` in it; not of functions and classes."""
    for node in body:
        yield node, typing_only
        if isinstance(node, ast.If):
            guarded = typing_only or ast.unparse(node.test).endswith("TYPE_CHECKING")
            yield from statements(node.body, guarded)
            yield from statements(node.orelse, typing_only)
        elif isinstance(node, ast.Try):
            handlers = [s for handler in node.handlers for s in handler.body]
            yield from statements([*node.body, *handlers, *node.orelse, *node.finalbody], typing_only)
        elif isinstance(node, ast.With):
            yield from statements(node.body, typing_only)


def targets(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr | None, ast.expr | None]]:
    """What a statement assigns to, with the value and the annotation where they are stated."""
    if isinstance(node, ast.AnnAssign):
        yield node.target, node.value, node.annotation
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple | ast.List):
                values = node.value.elts if isinstance(node.value, ast.Tuple | ast.List) else []
                paired = values if len(values) == len(target.elts) else [None] * len(target.elts)
                yield from ((t, v, None) for t, v in zip(target.elts, paired, strict=True))
            else:
                yield target, node.value, None
    elif isinstance(node, ast.For):
        yield node.target, None, None
    elif isinstance(node, ast.With):
        yield from ((item.optional_vars, None, None) for item in node.items if item.optional_vars is not None)


def unsubscripted(node: ast.expr) -> ast.expr:
    """``Generic`` of ``Generic[T]``."""
    return node.value if isinstance(node, ast.Subscript) else node


def full_decorators(node: FunctionNode | ast.ClassDef) -> list[str]:
    """The decorators as written, without their arguments."""
    return [ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list]


def decorators_of(node: FunctionNode | ast.ClassDef) -> list[str]:
    """Last parts of the decorators' names."""
    return [name.rpartition(".")[2] for name in full_decorators(node)]
