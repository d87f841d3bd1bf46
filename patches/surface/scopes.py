"""Scopes of a module: which nodes belong to which function, and what binds a name there."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from elora_sglang.patches.surface.code import Class, Function, Module
from elora_sglang.patches.surface.syntax import FunctionNode, imports

_COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
_INNER = FunctionNode | ast.Lambda | ast.ClassDef | _COMPREHENSIONS


@dataclasses.dataclass(eq=False)
class Binding:
    """One place that gives a name its value; what ``node`` and ``extra`` are depends on ``kind``."""

    kind: str
    node: Any
    extra: Any = None


class Scope:
    """The body of a module, function, lambda or comprehension."""

    def __init__(
        self, module: Module, node: ast.AST, parent: Scope | None = None, function: Function | None = None
    ) -> None:
        self.module, self.node, self.parent, self.function = module, node, parent, function
        self.key = id(node)

    def outwards(self) -> Iterator[Scope]:
        """This scope and those around it."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    @functools.cached_property
    def owner(self) -> Class | None:
        """The class whose method this is, or is in."""
        if self.function is not None and self.function.owner is not None:
            return self.function.owner
        return self.parent.owner if self.parent is not None else None

    @functools.cached_property
    def nodes(self) -> tuple[ast.AST, ...]:
        """All nodes of this scope but not of those in it; an inner scope's own node belongs to this one."""
        return tuple(_nodes(self.node))

    @functools.cached_property
    def bindings(self) -> dict[str, list[Binding]]:
        """What binds each name here; none for a module, whose names :class:`code.Module` has."""
        found: dict[str, list[Binding]] = defaultdict(list)
        if isinstance(self.node, FunctionNode | ast.Lambda):
            arguments = self.node.args
            for argument in ast.walk(arguments):
                if isinstance(argument, ast.arg):
                    found[argument.arg].append(Binding("parameter", argument))
        if isinstance(self.node, _COMPREHENSIONS):
            for number, generator in enumerate(self.node.generators):
                # The first iterable is evaluated outside.
                _unpack(generator.target, generator.iter, None if number else self.parent, found)
        for node in self.nodes:
            self._bind(node, found)
        if isinstance(self.node, ast.Module):
            loops = {name: [b for b in bs if b.kind == "elements"] for name, bs in found.items()}
            return {name: bs for name, bs in loops.items() if bs and name not in self.module.names}
        return dict(found)

    def _bind(self, node: ast.AST, found: dict[str, list[Binding]]) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                _assign(target, node.value, found)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id].append(Binding("annotation", node.annotation, node.value))
        elif isinstance(node, ast.NamedExpr):
            found[node.target.id].append(Binding("value", node.value))
        elif isinstance(node, ast.For | ast.AsyncFor):
            _unpack(node.target, node.iter, None, found)
        elif isinstance(node, ast.withitem) and isinstance(node.optional_vars, ast.Name):
            found[node.optional_vars.id].append(Binding("value", node.context_expr))
        elif isinstance(node, ast.Import | ast.ImportFrom) and not isinstance(self.node, ast.Module):
            for name, bound in imports(self.module.name, self.module.is_package, node):
                found[name].append(Binding("import", bound))
        elif (
            isinstance(node, FunctionNode) and node is not self.node and not isinstance(self.node, ast.Module)
        ):
            found[node.name].append(Binding("function", node))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if node.func.attr in ("append", "add") and isinstance(node.func.value, ast.Name):
                found[node.func.value.id].append(Binding("appended", node.args[0]))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) == 2:
            tested = node.args[0] if node.func.id == "isinstance" else None
            if isinstance(tested, ast.Name) and not isinstance(self.node, ast.Module | _COMPREHENSIONS):
                found[tested.id].append(Binding("isinstance", node.args[1]))


def _assign(target: ast.expr, value: ast.expr, found: dict[str, list[Binding]]) -> None:
    if isinstance(target, ast.Name):
        found[target.id].append(Binding("value", value))
    elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
        found[target.value.id].append(Binding("stored", value))
    elif isinstance(target, ast.Tuple | ast.List):
        if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts):
            for inner, part in zip(target.elts, value.elts, strict=True):
                _assign(inner, part, found)
            return
        for index, inner in enumerate(target.elts):
            if isinstance(inner, ast.Name):
                found[inner.id].append(Binding("item", value, index))


def _unpack(
    target: ast.expr, iterable: ast.expr, scope: Scope | None, found: dict[str, list[Binding]]
) -> None:
    if isinstance(target, ast.Name):
        found[target.id].append(Binding("elements", iterable, scope))
    elif isinstance(target, ast.Tuple | ast.List):
        for index, inner in enumerate(target.elts):
            if isinstance(inner, ast.Name):
                found[inner.id].append(Binding("element item", iterable, (scope, index)))


def _nodes(root: ast.AST) -> Iterator[ast.AST]:
    if isinstance(root, FunctionNode):
        first: list[ast.AST] = list(root.body)
    elif isinstance(root, ast.Lambda):
        first = [root.body]
    elif isinstance(root, _COMPREHENSIONS):
        first = [root.key, root.value] if isinstance(root, ast.DictComp) else [root.elt]
        for number, generator in enumerate(root.generators):
            first += [generator.target, *generator.ifs, *([generator.iter] if number else [])]
    else:
        first = list(ast.iter_child_nodes(root))
    stack = first[::-1]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(list(_outer_parts(node))))


def _outer_parts(node: ast.AST) -> Iterator[ast.AST]:
    """Children of a node that belong to the same scope: of an inner scope, what is evaluated outside of it."""
    if isinstance(node, FunctionNode):
        yield from (
            *node.decorator_list,
            *node.args.defaults,
            *(d for d in node.args.kw_defaults if d is not None),
        )
    elif isinstance(node, ast.Lambda):
        yield from (*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None))
    elif isinstance(node, ast.ClassDef):
        # A class body has no scope of its own here; its methods are found through the class.
        yield from (*node.decorator_list, *node.bases, *(k.value for k in node.keywords))
        yield from (s for s in node.body if not isinstance(s, FunctionNode | ast.ClassDef))
    elif isinstance(node, _COMPREHENSIONS):
        yield node.generators[0].iter
    else:
        yield from ast.iter_child_nodes(node)
