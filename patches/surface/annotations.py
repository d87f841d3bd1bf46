"""Types as annotations state them: ``Req``, ``"Req"``, ``Optional[Req]``, ``list[Req] | None``, ``type[Req]``."""

from __future__ import annotations

import ast

from elora_sglang.patches.surface.atoms import EMPTY, Cls, Inst, Map, Seq, Type
from elora_sglang.patches.surface.code import Class, Code, Module, Value
from elora_sglang.patches.surface.scopes import Scope

_SEQUENCES = frozenset(
    {
        *("list", "List", "set", "Set", "frozenset", "FrozenSet", "Sequence", "MutableSequence", "Iterable"),
        *("Iterator", "Collection", "deque", "Deque", "AsyncIterator", "Generator", "AsyncGenerator"),
    }
)
_MAPS = frozenset({"dict", "Dict", "Mapping", "MutableMapping", "defaultdict", "DefaultDict", "OrderedDict"})
_TRANSPARENT = frozenset(
    {"Optional", "Final", "ClassVar", "Annotated", "Awaitable", "Required", "NotRequired"}
)


class Annotations:
    """Reads annotations of one :class:`Code`."""

    def __init__(self, code: Code) -> None:
        self.code = code

    def type(self, node: ast.expr | None, module: Module, scope: Scope | None) -> Type:
        """The type that an annotation states; empty for ``Any``, builtins and what lies outside the packages."""
        if node is None:
            return EMPTY
        if isinstance(node, ast.Constant):
            return self._quoted(node.value, module, scope) if isinstance(node.value, str) else EMPTY
        if isinstance(node, ast.BinOp):
            return self.type(node.left, module, scope) | self.type(node.right, module, scope)
        if isinstance(node, ast.Subscript):
            return self._generic(node, module, scope)
        found = self._named(node, module, scope)
        if isinstance(found, Class):
            return frozenset({Inst(found)})
        if isinstance(found, Value) and found.value is not None and _is_alias(found):
            return self.type(found.value, found.module, None)
        return EMPTY

    def _quoted(self, text: str, module: Module, scope: Scope | None) -> Type:
        try:
            return self.type(ast.parse(text, mode="eval").body, module, scope)
        except SyntaxError:
            return EMPTY

    def _named(self, node: ast.expr, module: Module, scope: Scope | None) -> object:
        # A name that the function itself imports goes before the module's.
        while isinstance(node, ast.Name) and scope is not None:
            for binding in scope.bindings.get(node.id, ()):
                if binding.kind == "import":
                    return self.code.imported(binding.node)
            scope = scope.parent
        return self.code.expression(module, node)

    def _generic(self, node: ast.Subscript, module: Module, scope: Scope | None) -> Type:
        name = ast.unparse(node.value).rpartition(".")[2]
        inner = list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]
        types = [self.type(part, module, scope) for part in inner]
        if name == "Union":
            return frozenset().union(*types)
        if name in _TRANSPARENT:
            return types[0]
        if name == "Coroutine":
            return types[-1]
        if name in ("type", "Type"):
            return frozenset(Cls(atom.cls) for atom in types[0] if isinstance(atom, Inst))
        if name in ("tuple", "Tuple"):
            endless = len(inner) == 2 and isinstance(inner[1], ast.Constant) and inner[1].value is Ellipsis
            return frozenset({Seq(types[0]) if endless else Seq(EMPTY, tuple(types))})
        if name in _SEQUENCES:
            return frozenset({Seq(types[0])}) if types[0] else EMPTY
        if name in _MAPS and len(types) == 2:
            return frozenset({Map(types[0], types[1])}) if types[0] or types[1] else EMPTY
        return self.type(node.value, module, scope)


def _is_alias(value: Value) -> bool:
    return isinstance(value.value, ast.Subscript | ast.BinOp | ast.Name | ast.Attribute)
