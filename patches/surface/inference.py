"""Which expressions of our code are SGLang's objects: what they may be, found without running anything.

A *type* is a set of atoms: instances, classes, functions, modules, containers of types, constant strings. Sets only
grow: assignments of one name are united, and the arguments of every call that is seen flow into the parameters of
our functions (a control-flow-insensitive analysis, "0-CFA"). :meth:`Inference.settle` repeats until nothing is new.
Types come from annotations first, on both sides. Where SGLang says nothing, nothing is known, and nothing is guessed.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from elora_sglang.patches.surface.annotations import Annotations
from elora_sglang.patches.surface.atoms import EMPTY, Cls, Fn, Inst, Map, Mod, Seq, Str, Sup, Type, elements
from elora_sglang.patches.surface.code import Class, Code, Found, Function, Member, Module, Value
from elora_sglang.patches.surface.conventions import CONVENTIONS
from elora_sglang.patches.surface.scopes import Binding, Scope
from elora_sglang.patches.surface.syntax import FunctionNode

#: Package of our code; the functions of others get nothing from the calls that are seen.
OURS = "elora_sglang"
_ROUNDS = 6
_SAME = frozenset({"list", "tuple", "set", "frozenset", "sorted", "reversed", "iter", "deque"})
_FROM_ELEMENTS = frozenset({"next", "min", "max"})


class Inference:
    """Types of expressions in all scopes of one :class:`Code`."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.annotations = Annotations(code)
        self.scopes: dict[ast.AST, Scope] = {}
        #: Types that reach a parameter or a dataclass field of ours: by function or class node, and its name.
        self.given: dict[tuple[ast.AST, str], Type] = defaultdict(lambda: EMPTY)
        self._known: dict[tuple[int, Any], Type] = {}
        self._before: dict[tuple[int, Any], Type] = {}
        self._open: set[tuple[int, Any]] = set()

    # -- scopes -----------------------------------------------------------------------------------

    def module_scope(self, module: Module) -> Scope:
        if module.tree not in self.scopes:
            self.scopes[module.tree] = Scope(module, module.tree)
        return self.scopes[module.tree]

    def scope_of(self, function: Function) -> Scope:
        """The scope of a function that is no lambda in another one."""
        if function.node not in self.scopes:
            parent = self.module_scope(function.module)
            self.scopes[function.node] = Scope(function.module, function.node, parent, function)
        return self.scopes[function.node]

    def inner_scope(self, node: ast.AST, scope: Scope) -> Scope:
        """The scope of a nested function, lambda or comprehension."""
        if node not in self.scopes:
            function = None
            if isinstance(node, FunctionNode | ast.Lambda):
                function = Function(scope.module, node, getattr(node, "name", "<lambda>"))
            self.scopes[node] = Scope(scope.module, node, scope, function)
        return self.scopes[node]

    def _inner_function(self, node: ast.AST, scope: Scope) -> Function:
        function = self.inner_scope(node, scope).function
        assert function is not None  # the node is a function or a lambda
        return function

    def settle(self, scopes: list[Scope]) -> None:
        """Let arguments flow into parameters until nothing is new. ``scopes``: all of our code."""
        calls = [(node, scope) for scope in scopes for node in scope.nodes if isinstance(node, ast.Call)]
        for _ in range(_ROUNDS):
            before = dict(self.given)
            self._before, self._known = self._known, {}
            for node, scope in calls:
                self._flow(node, scope)
            if before == self.given:
                return

    def _flow(self, call: ast.Call, scope: Scope) -> None:
        for atom in self.of(call.func, scope):
            if isinstance(atom, Fn) and self._is_ours(atom.function.module):
                self._bind(atom.function, call, scope, skip=int(atom.bound))
            elif isinstance(atom, Cls) and self._is_ours(atom.cls.module):
                member = atom.cls.member("__init__")
                if member is not None and member.function is not None and self._is_ours(member.owner.module):
                    self._bind(member.function, call, scope, skip=1)
                elif member is None:
                    names = [
                        m.name for cls in reversed(atom.cls.mro) for m in cls.own.values() if m.annotation
                    ]
                    self._give(atom.cls.node, names, call, scope)

    def _bind(self, function: Function, call: ast.Call, scope: Scope, skip: int) -> None:
        arguments = function.node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)][skip:]
        self._give(function.node, names, call, scope)

    def _give(self, owner: ast.AST, names: list[str], call: ast.Call, scope: Scope) -> None:
        pairs = [(n, a) for n, a in zip(names, call.args, strict=False) if not isinstance(a, ast.Starred)]
        pairs += [(k.arg, k.value) for k in call.keywords if k.arg is not None]
        for name, argument in pairs:
            type_ = self.of(argument, scope)
            if type_:
                self.given[owner, name] |= type_

    @staticmethod
    def _is_ours(module: Module) -> bool:
        return module.name.partition(".")[0] == OURS

    # -- names ------------------------------------------------------------------------------------

    def name(self, name: str, scope: Scope | None, at: Scope) -> Type:
        """What a name may stand for where it is used."""
        while scope is not None:
            if name in scope.bindings:
                key = (id(scope), name)
                return self._once(key, lambda s=scope: self._united(s, name))
            scope = scope.parent
        found = self.code.attribute(at.module, name)
        return self.thing(found)

    def _united(self, scope: Scope, name: str) -> Type:
        types = [self._binding(binding, scope) for binding in scope.bindings[name]]
        return frozenset().union(*types)

    def _binding(self, binding: Binding, scope: Scope) -> Type:
        kind, node = binding.kind, binding.node
        if kind == "value":
            return self.of(node, scope)
        if kind == "annotation":
            declared = self.annotations.type(node, scope.module, scope)
            return declared or (self.of(binding.extra, scope) if binding.extra is not None else EMPTY)
        if kind == "elements":
            return elements(self.of(node, binding.extra or scope))
        if kind == "stored":
            values = self.of(node, scope)
            return frozenset({Map(EMPTY, values)}) if values else EMPTY
        if kind == "appended":
            return self._sequence([self.of(node, scope)])
        if kind == "item":
            return self._item(self.of(node, scope), binding.extra)
        if kind == "element item":
            return self._item(elements(self.of(node, binding.extra[0] or scope)), binding.extra[1])
        if kind == "isinstance":
            return frozenset(Inst(a.cls) for a in self._flat(self.of(node, scope)) if isinstance(a, Cls))
        if kind == "import":
            return self.thing(self.code.imported(node))
        if kind == "function":
            return frozenset({Fn(self._inner_function(node, scope))})
        return self._parameter(node, scope) if kind == "parameter" else EMPTY

    @staticmethod
    def _flat(type_: Type) -> Type:
        return type_ | elements(type_)

    @staticmethod
    def _item(type_: Type, index: int) -> Type:
        found: Type = EMPTY
        for atom in type_:
            if isinstance(atom, Seq):
                found |= (
                    atom.items[index]
                    if atom.items and index < len(atom.items)
                    else elements(frozenset({atom}))
                )
        return found

    def _parameter(self, argument: ast.arg, scope: Scope) -> Type:
        function = scope.function
        assert function is not None
        arguments = function.node.args
        first = next(iter([*arguments.posonlyargs, *arguments.args]), None)
        if function.owner is not None and argument is first and not function.is_static:
            declared = self.annotations.type(argument.annotation, scope.module, scope)
            is_class = "classmethod" in function.decorators or function.name == "__new__"
            return declared or frozenset({Cls(function.owner) if is_class else Inst(function.owner)})
        declared = self.annotations.type(argument.annotation, scope.module, scope)
        if argument is arguments.vararg or argument is arguments.kwarg:
            return EMPTY
        found = declared or self._inherited(argument.arg, function) | self.given[function.node, argument.arg]
        return found or self._by_convention(argument.arg)

    def _by_convention(self, name: str) -> Type:
        cls = self.code.find(CONVENTIONS[name]) if name in CONVENTIONS else None
        return frozenset({Inst(cls)}) if isinstance(cls, Class) else EMPTY

    def _inherited(self, name: str, function: Function) -> Type:
        """What a base class declares for the parameter of a method that overrides its own."""
        if function.owner is None:
            return EMPTY
        for base in function.owner.mro[1:]:
            member = base.own.get(function.name)
            if member is not None and member.function is not None:
                for argument in all_arguments(member.function.node):
                    if argument.arg == name:
                        return self.annotations.type(argument.annotation, base.module, None)
        return EMPTY

    def thing(self, found: Found | None) -> Type:
        """The type of what a module binds."""
        if isinstance(found, Module):
            return frozenset({Mod(found)})
        if isinstance(found, Class):
            return frozenset({Cls(found)})
        if isinstance(found, Function):
            return frozenset({Fn(found)})
        if isinstance(found, Value):
            return self._once((id(found), "value"), lambda: self._value(found))
        return EMPTY

    def _value(self, value: Value) -> Type:
        scope = self.module_scope(value.module)
        declared = self.annotations.type(value.annotation, value.module, scope)
        return declared or (self.of(value.value, scope) if value.value is not None else EMPTY)

    # -- expressions ------------------------------------------------------------------------------

    def of(self, node: ast.expr, scope: Scope) -> Type:
        """What an expression may be; empty when nothing is known."""
        return self._once((id(node), scope.key), lambda: self._of(node, scope))

    def _once(self, key: tuple[int, Any], work: Any) -> Type:
        known = self._known.get(key)
        if known is not None:
            return known
        if key in self._open:
            return self._before.get(key, EMPTY)
        self._open.add(key)
        try:
            found = work()
        finally:
            self._open.discard(key)
        self._known[key] = found
        return found

    def _of(self, node: ast.expr, scope: Scope) -> Type:
        if isinstance(node, ast.Name):
            return self.name(node.id, scope, scope)
        if isinstance(node, ast.Attribute):
            return self.attribute(self.of(node.value, scope), node.attr)
        if isinstance(node, ast.Call):
            return self._call(node, scope)
        if isinstance(node, ast.Constant):
            return frozenset({Str(node.value)}) if isinstance(node.value, str) else EMPTY
        if isinstance(node, ast.Await | ast.Starred | ast.NamedExpr):
            return self.of(node.value, scope)
        if isinstance(node, ast.IfExp):
            return self.of(node.body, scope) | self.of(node.orelse, scope)
        if isinstance(node, ast.BoolOp):
            return frozenset().union(*(self.of(value, scope) for value in node.values))
        if isinstance(node, ast.BinOp):
            return frozenset(
                a for s in (node.left, node.right) for a in self.of(s, scope) if isinstance(a, Seq)
            )
        if isinstance(node, ast.Lambda):
            return frozenset({Fn(self._inner_function(node, scope))})
        if isinstance(node, ast.Tuple):
            return frozenset({Seq(EMPTY, tuple(self.of(e, scope) for e in node.elts))}).difference(
                {Seq(EMPTY)}
            )
        if isinstance(node, ast.List | ast.Set):
            return self._sequence([self._element(e, scope) for e in node.elts])
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp):
            return self._sequence([self.of(node.elt, self.inner_scope(node, scope))])
        if isinstance(node, ast.DictComp):
            inner = self.inner_scope(node, scope)
            return frozenset({Map(self.of(node.key, inner), self.of(node.value, inner))})
        if isinstance(node, ast.Dict):
            values = frozenset().union(*(self.of(v, scope) for v in node.values)) if node.values else EMPTY
            return frozenset({Map(EMPTY, values)}) if values else EMPTY
        return self._subscript(node, scope) if isinstance(node, ast.Subscript) else EMPTY

    def _element(self, node: ast.expr, scope: Scope) -> Type:
        return elements(self.of(node.value, scope)) if isinstance(node, ast.Starred) else self.of(node, scope)

    @staticmethod
    def _sequence(types: list[Type]) -> Type:
        united: Type = frozenset().union(*types)
        return frozenset({Seq(frozenset(a for a in united if not isinstance(a, Seq)))}) if united else EMPTY

    def _subscript(self, node: ast.Subscript, scope: Scope) -> Type:
        found: Type = EMPTY
        if ast.unparse(node.value) == "sys.modules" and self.is_constant(node.slice, scope):
            return frozenset().union(
                *(self.thing(self.code.module(n)) for n in self.strings(node.slice, scope))
            )
        for atom in self.of(node.value, scope):
            if isinstance(atom, Map):
                found |= atom.values
            elif isinstance(atom, Seq) and isinstance(node.slice, ast.Slice):
                found |= {atom}
            elif isinstance(atom, Seq):
                index = node.slice.value if isinstance(node.slice, ast.Constant) else None
                alone: Type = frozenset({atom})
                found |= self._item(alone, index) if isinstance(index, int) else elements(alone)
            elif isinstance(atom, Cls):
                found |= {atom}  # type arguments
            elif isinstance(atom, Inst):
                found |= self.result(self.attribute(frozenset({atom}), "__getitem__"))
        return found

    def attribute(self, type_: Type, name: str) -> Type:
        """The attribute ``name`` of whatever ``type_`` may be."""
        found: Type = EMPTY
        for atom in type_:
            if isinstance(atom, Mod):
                found |= self.thing(self.code.attribute(atom.module, name))
            elif isinstance(atom, Inst | Cls | Sup):
                member = self.member_of(atom, name)
                if member is not None:
                    found |= self._once((id(member), type(atom)), lambda m=member, a=atom: self._member(m, a))
            elif isinstance(atom, Map):
                found |= self._of_map(atom, name)
        return found

    @staticmethod
    def member_of(atom: Inst | Cls | Sup, name: str) -> Member | None:
        if isinstance(atom, Sup):
            return next((cls.own[name] for cls in atom.cls.mro[1:] if name in cls.own), None)
        return atom.cls.member(name) or atom.cls.seen_through.member(name)

    @staticmethod
    def _of_map(atom: Map, name: str) -> Type:
        # Methods of a dict are known by what they return, see `_call`.
        return (
            frozenset({Map(atom.keys, atom.values, name)})
            if name in ("values", "items", "keys", "get", "pop", "setdefault")
            else EMPTY
        )

    def _member(self, member: Member, atom: Inst | Cls | Sup) -> Type:
        module = member.owner.module
        if member.nested is not None:
            return frozenset({Cls(member.nested)})
        if member.function is not None:
            if member.kind == "property":
                return EMPTY if isinstance(atom, Cls) else self.returned(member.function)
            bound = not member.function.is_static and (
                not isinstance(atom, Cls) or "classmethod" in member.function.decorators
            )
            return frozenset({Fn(member.function, bound)})
        if member.owner.is_enum and member.value is not None:
            return frozenset({Inst(member.owner)})
        scope = self.scope_of(member.inside) if member.inside is not None else self.module_scope(module)
        declared = self.annotations.type(member.annotation, module, scope)
        if declared:
            return declared
        found = self.of(member.value, scope) if member.value is not None else EMPTY
        return found | self.given[member.owner.node, member.name] or self._by_convention(member.name)

    # -- calls ------------------------------------------------------------------------------------

    def _call(self, node: ast.Call, scope: Scope) -> Type:
        special = self._builtin(node, scope) if isinstance(node.func, ast.Name | ast.Attribute) else None
        return special if special is not None else self.result(self.of(node.func, scope))

    def _builtin(self, node: ast.Call, scope: Scope) -> Type | None:
        function, arguments = node.func, node.args
        name = function.id if isinstance(function, ast.Name) else function.attr  # type: ignore[attr-defined]
        if name == "super" and scope.owner is not None:
            return frozenset({Sup(scope.owner)})
        if not arguments:
            return None
        if name == "getattr":
            return frozenset().union(
                *(self.attribute(self.of(arguments[0], scope), a) for a in self.strings(arguments[1], scope))
            )
        if name in ("import_module", "resolve_name") and self.is_constant(arguments[0], scope):
            return frozenset().union(
                *(self.thing(self.code.find(a)) for a in self.strings(arguments[0], scope))
            )
        if name == "type" and len(arguments) == 1:
            return frozenset(Cls(a.cls) for a in self.of(arguments[0], scope) if isinstance(a, Inst))
        if name == "cast" and len(arguments) == 2:
            return self.annotations.type(arguments[0], scope.module, scope)
        if name in _SAME and isinstance(function, ast.Name):
            found = elements(self.of(arguments[0], scope))
            return frozenset({Seq(found)}) if found else EMPTY
        if name == "enumerate" and isinstance(function, ast.Name):
            return frozenset({Seq(frozenset({Seq(EMPTY, (EMPTY, elements(self.of(arguments[0], scope))))}))})
        if name == "zip" and isinstance(function, ast.Name):
            return frozenset(
                {Seq(frozenset({Seq(EMPTY, tuple(elements(self.of(a, scope)) for a in arguments))}))}
            )
        if name in _FROM_ELEMENTS and isinstance(function, ast.Name):
            return elements(self.of(arguments[0], scope))
        return None

    def is_constant(self, node: ast.expr, scope: Scope) -> bool:
        """Whether an expression is a string as written, or a module's constant; not what a parameter brings."""
        local = isinstance(node, ast.Name) and any(node.id in s.bindings for s in scope.outwards())
        return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and not local)

    def strings(self, node: ast.expr, scope: Scope) -> list[str]:
        """The constant strings that an expression may be, sorted."""
        return sorted(atom.value for atom in self.of(node, scope) if isinstance(atom, Str))

    def result(self, type_: Type) -> Type:
        """What calling ``type_`` may return."""
        found: Type = EMPTY
        for atom in type_:
            if isinstance(atom, Cls):
                found |= {Inst(atom.cls)}
            elif isinstance(atom, Fn):
                found |= self.returned(atom.function)
            elif isinstance(atom, Map) and atom.method:
                pairs = Seq(EMPTY, (atom.keys, atom.values))
                inner = {"values": atom.values, "keys": atom.keys, "items": frozenset({pairs})}.get(
                    atom.method
                )
                found |= atom.values if inner is None else frozenset({Seq(inner)})
            elif isinstance(atom, Inst):
                found |= self.result(self.attribute(frozenset({atom}), "__call__"))
        return found

    def returned(self, function: Function) -> Type:
        """What a function returns: as declared, else as its return statements say."""
        return self._once((id(function.node), "returns"), lambda: self._returned(function))

    def _returned(self, function: Function) -> Type:
        node = function.node
        scope = self.scopes.get(node) or self.scope_of(function)
        if isinstance(node, ast.Lambda):
            return self.of(node.body, scope)
        declared = self.annotations.type(node.returns, function.module, scope)
        if declared or (node.returns is not None and not self._says_any(node.returns)):
            return declared
        values = [n.value for n in scope.nodes if isinstance(n, ast.Return) and n.value is not None]
        return frozenset().union(*(self.of(value, scope) for value in values))

    @staticmethod
    def _says_any(node: ast.expr) -> bool:
        return any(isinstance(n, ast.Name) and n.id in ("Any", "Callable") for n in ast.walk(node))


def all_arguments(node: FunctionNode | ast.Lambda) -> Iterator[ast.arg]:
    """Every parameter that has a name of its own."""
    arguments = node.args
    yield from (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
