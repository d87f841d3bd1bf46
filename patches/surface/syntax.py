"""Small questions about syntax trees, of which any reader of source has the same."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


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
