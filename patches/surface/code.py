"""Python source read as text: modules, classes and their members. Nothing that is read is imported."""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias
from zlib import crc32

from elora_sglang.patches.surface.conventions import ASSEMBLED, VIEWS
from elora_sglang.patches.surface.syntax import (
    FunctionNode,
    Import,
    decorators_of,
    full_decorators,
    imports,
    statements,
    targets,
    unsubscripted,
)

#: Decorators that make a method a value.
_PROPERTIES = frozenset({"property", "cached_property", "abstractproperty"})
#: Bases that make a constructor out of a class's fields.
_RECORDS = frozenset({"Struct", "BaseModel", "NamedTuple"})
#: Bases outside the packages that add no public attribute which our code could mean.
_PLAIN_BASES = frozenset({"object", "ABC", "Generic", "Protocol", "Enum", "IntEnum", "StrEnum", "Struct"})


@dataclasses.dataclass(eq=False)
class Function:
    """A function, method or lambda; ``owner`` is the class that a method belongs to."""

    module: Module
    node: FunctionNode | ast.Lambda
    name: str
    owner: Class | None = None

    def __hash__(self) -> int:
        return crc32(f"{self.module.name}:{self.node.lineno}:{self.name}".encode())

    @functools.cached_property
    def decorators(self) -> frozenset[str]:
        return frozenset() if isinstance(self.node, ast.Lambda) else frozenset(decorators_of(self.node))

    @property
    def is_static(self) -> bool:
        return "staticmethod" in self.decorators

    @property
    def is_property(self) -> bool:
        return bool(self.decorators & _PROPERTIES)

    @property
    def path(self) -> str:
        return f"{self.owner.path if self.owner else self.module.name}.{self.name}"


@dataclasses.dataclass(eq=False)
class Member:
    """One attribute of a class: a method, a nested class, a class variable, a field or an instance attribute.

    ``inside``: the method whose body assigns it; None in the class body.
    """

    name: str
    kind: str  # "method", "property", "class" or "attribute"
    owner: Class
    function: Function | None = None
    nested: Class | None = None
    annotation: ast.expr | None = None
    value: ast.expr | None = None
    inside: Function | None = None
    node: ast.AST | None = None


@dataclasses.dataclass(eq=False)
class Value:
    """A module-level variable; the first assignment that was found."""

    module: Module
    name: str
    node: ast.stmt
    annotation: ast.expr | None
    value: ast.expr | None


@dataclasses.dataclass(eq=False)
class Class:
    """A class as its source states it."""

    code: Code
    module: Module
    node: ast.ClassDef
    path: str

    # Sets of these are walked in the same order in every process, so that what is found is the same.
    def __hash__(self) -> int:
        return crc32(self.path.encode())

    @functools.cached_property
    def bases(self) -> tuple[Class, ...]:
        """Direct bases that lie in the packages that are read."""
        found = (self.code.expression(self.module, unsubscripted(base)) for base in self.node.bases)
        return tuple(base for base in found if isinstance(base, Class))

    @functools.cached_property
    def base_names(self) -> tuple[str, ...]:
        """Direct bases as written, without type arguments."""
        return tuple(ast.unparse(unsubscripted(base)) for base in self.node.bases)

    @functools.cached_property
    def mro(self) -> tuple[Class, ...]:
        """The class and its bases that are read, each once, a base after all that derive from it."""
        order: list[Class] = [self]
        for base in self.bases:
            for cls in base.mro:
                if cls in order:
                    order.remove(cls)
                order.append(cls)
        return (*order, *self.assembled)

    @property
    def assembled(self) -> tuple[Class, ...]:
        """Classes whose fields are this one's, too; empty but for what is assembled at import."""
        package = ASSEMBLED.get(self.path)
        folder = self.code.module(package) if package is not None else None
        if folder is None or package is None:
            return ()
        modules = (
            self.code.module(f"{package}.{path.stem}") for path in sorted(folder.path.parent.glob("*.py"))
        )
        return tuple(
            thing
            for module in modules
            if module is not None
            for thing in module.names.values()
            if isinstance(thing, Class)
        )

    @property
    def seen_through(self) -> Class:
        """The class whose attributes an instance shows: its own, or for a view the one behind it."""
        behind = self.code.find(VIEWS[self.path]) if self.path in VIEWS else None
        return behind if isinstance(behind, Class) else self

    @functools.cached_property
    def is_open(self) -> bool:
        """Whether it may have attributes that its source does not show."""
        for cls in self.mro:
            bases = [unsubscripted(base) for base in cls.node.bases]
            outside = [ast.unparse(base) for base in bases if self.code.expression(cls.module, base) is None]
            if "__getattr__" in cls.own or any(n.rpartition(".")[2] not in _PLAIN_BASES for n in outside):
                return True
        return False

    @functools.cached_property
    def is_enum(self) -> bool:
        return any(name.rpartition(".")[2].endswith("Enum") for cls in self.mro for name in cls.base_names)

    @functools.cached_property
    def is_record(self) -> bool:
        """Whether its constructor is made out of its fields."""
        return any(
            "dataclass" in decorators_of(cls.node)
            or {n.rpartition(".")[2] for n in cls.base_names} & _RECORDS
            for cls in self.mro
        )

    @functools.cached_property
    def is_keyword_record(self) -> bool:
        """Whether the fields are given by keyword only."""
        marks = [ast.unparse(d) for d in self.node.decorator_list if isinstance(d, ast.Call)]
        marks += [f"{k.arg}={ast.unparse(k.value)}" for k in self.node.keywords]
        models = any({n.rpartition(".")[2] for n in cls.base_names} & {"BaseModel"} for cls in self.mro)
        return models or any("kw_only=True" in mark for mark in marks)

    @functools.cached_property
    def own(self) -> dict[str, Member]:
        """Members that this class itself defines; the class body goes before assignments to ``self``."""
        found: dict[str, Member] = {}
        _class_body(self, self.node.body, found)
        for member in list(found.values()):
            if member.function is not None and isinstance(member.function.node, FunctionNode):
                _assigned_to_self(self, member.function, found)
        return found

    def member(self, name: str) -> Member | None:
        """The member as an instance sees it, or None."""
        return next((cls.own[name] for cls in self.mro if name in cls.own), None)

    @functools.cached_property
    def abstract(self) -> frozenset[str]:
        """Methods that a subclass has to define before it can be made."""
        names = {name for cls in self.mro for name in cls.own}
        found = ((name, self.member(name)) for name in names)
        return frozenset(
            name
            for name, m in found
            if m is not None and m.function and "abstractmethod" in m.function.decorators
        )


@dataclasses.dataclass(eq=False)
class Module:
    """One source file."""

    code: Code
    name: str
    path: Path
    is_package: bool
    text: str

    def __hash__(self) -> int:
        return crc32(self.name.encode())

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @functools.cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @functools.cached_property
    def names(self) -> dict[str, Import | Class | Function | Value]:
        """What the module's top level binds. A definition goes before an import, an import before a value."""
        found: dict[str, Import | Class | Function | Value] = {}
        self.stars: list[str] = []
        for statement, typing_only in statements(self.tree.body):
            self._bind(statement, typing_only, found)
        return found

    def _bind(
        self, node: ast.stmt, typing_only: bool, found: dict[str, Import | Class | Function | Value]
    ) -> None:
        if isinstance(node, ast.ClassDef):
            found[node.name] = Class(self.code, self, node, f"{self.name}.{node.name}")
        elif isinstance(node, FunctionNode):
            found[node.name] = Function(self, node, node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for name, bound in imports(self.name, self.is_package, node, typing_only):
                if name == "*":
                    self.stars.append(bound.module)
                elif name not in found or isinstance(found[name], Value):
                    found[name] = bound
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                        value = node.value if isinstance(target, ast.Name) else None
                        found.setdefault(part.id, Value(self, part.id, node, annotation, value))


#: What a module's name stands for, and with the members of classes what a dotted path does.
Bound: TypeAlias = Module | Class | Function | Value
Found: TypeAlias = Bound | Member


class Code:
    """Packages as folders of source files; modules are read when they are asked for.

    Args:
        roots: for each package its folder, e.g. ``{"sglang": Path(".../site-packages/sglang")}``.
    """

    def __init__(self, roots: dict[str, Path]) -> None:
        self.roots = roots
        self._modules: dict[str, Module | None] = {}
        self._files: dict[str, tuple[tuple[str, Path], ...]] = {}

    @property
    def modules_read(self) -> tuple[Module, ...]:
        """All modules that were looked at so far."""
        return tuple(module for module in self._modules.values() if module is not None)

    def module(self, name: str) -> Module | None:
        """The module, or None where there is no such file. Raises SyntaxError for one that is not Python."""
        if name not in self._modules:
            self._modules[name] = self._read(name)
        return self._modules[name]

    def _read(self, name: str) -> Module | None:
        package, *rest = name.split(".")
        if package not in self.roots:
            return None
        base = self.roots[package].joinpath(*rest)
        for path, is_package in ((base / "__init__.py", True), (base.with_suffix(".py"), False)):
            if path.is_file() and (rest or is_package):
                return Module(self, name, path, is_package, path.read_text())
        # A folder without __init__.py is a package without names.
        return Module(self, name, base, True, "") if base.is_dir() else None

    def find(self, path: str) -> Found | None:
        """What a dotted path means: the longest module first, then names in it and members of classes."""
        parts = path.split(".")
        for cut in range(len(parts), 0, -1):
            module = self.module(".".join(parts[:cut]))
            if module is not None:
                return self._below(module, parts[cut:])
        return None

    def _below(self, module: Module, names: list[str]) -> Found | None:
        found: Found | None = module
        for name in names:
            if isinstance(found, Member):
                found = found.nested
            if isinstance(found, Module):
                found = self.attribute(found, name)
            elif isinstance(found, Class):
                member = found.member(name)
                found = member.nested if member is not None and member.nested is not None else member
            else:
                return None
        return found

    def attribute(
        self, module: Module, name: str, seen: frozenset[tuple[str, str]] = frozenset()
    ) -> Bound | None:
        """A name of a module, looked for through re-exports; a submodule where nothing else has the name."""
        if (module.name, name) in seen:
            return None
        seen |= {(module.name, name)}
        bound = module.names.get(name)
        if isinstance(bound, Import):
            return self.imported(bound, seen)
        if bound is not None:
            return bound
        for star in module.stars:
            source = self.module(star)
            found = self.attribute(source, name, seen) if source is not None else None
            if found is not None:
                return found
        return self.module(f"{module.name}.{name}") if module.is_package else None

    def imported(self, bound: Import, seen: frozenset[tuple[str, str]] = frozenset()) -> Bound | None:
        """What an import binds, or None when it lies outside the packages that are read."""
        module = self.module(bound.module)
        if module is None or bound.name is None:
            return module
        return self.attribute(module, bound.name, seen)

    def expression(self, module: Module, node: ast.expr) -> Found | None:
        """What a dotted expression such as ``a.b.C`` means in a module."""
        if isinstance(node, ast.Name):
            return self.attribute(module, node.id)
        if isinstance(node, ast.Attribute):
            inner = self.expression(module, node.value)
            if isinstance(inner, Module):
                return self.attribute(inner, node.attr)
            if isinstance(inner, Class):
                member = inner.member(node.attr)
                return member.nested if member is not None and member.nested is not None else member
        return None

    def files(self, package: str) -> tuple[tuple[str, Path], ...]:
        """Every module's name and file below a package, symbolic links included, sorted by name."""
        if package not in self._files:
            self._files[package] = tuple(self._listed(package))
        return self._files[package]

    def _listed(self, package: str) -> Iterator[tuple[str, Path]]:
        root = self.roots[package]
        found = []
        for folder, path in _walk(root):
            inner = path.relative_to(root).with_suffix("")
            parts = inner.parts[:-1] if inner.name == "__init__" else inner.parts
            found.append((".".join((package, *parts)), folder / path.name))
        yield from sorted(found)


def _class_body(cls: Class, body: list[ast.stmt], found: dict[str, Member]) -> None:
    for node, _ in statements(body):
        if isinstance(node, FunctionNode):
            function = Function(cls.module, node, node.name, cls)
            # The setter of a property has its name, too.
            if node.name in found and any(d.endswith((".setter", ".deleter")) for d in full_decorators(node)):
                continue
            kind = "property" if function.is_property else "method"
            found[node.name] = Member(node.name, kind, cls, function=function, node=node)
        elif isinstance(node, ast.ClassDef):
            nested = Class(cls.code, cls.module, node, f"{cls.path}.{node.name}")
            found[node.name] = Member(node.name, "class", cls, nested=nested, node=node)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.setdefault(
                node.target.id,
                Member(
                    node.target.id, "attribute", cls, annotation=node.annotation, value=node.value, node=node
                ),
            )
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        value = node.value if isinstance(target, ast.Name) else None
                        found.setdefault(name.id, Member(name.id, "attribute", cls, value=value, node=node))


def _assigned_to_self(cls: Class, method: Function, found: dict[str, Member]) -> None:
    arguments = method.node.args
    first = next(iter([*arguments.posonlyargs, *arguments.args]), None)
    if first is None or method.is_static:
        return
    for node in ast.walk(method.node):
        if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.For | ast.With):
            continue
        for target, value, annotation in targets(node):
            if (
                isinstance(target, ast.Attribute)
                and isinstance(target.value, ast.Name)
                and target.value.id == first.arg
            ):
                known = found.get(target.attr)
                if known is not None and (
                    known.annotation is not None or known.function or _says_something(known)
                ):
                    continue
                found[target.attr] = Member(
                    target.attr,
                    "attribute",
                    cls,
                    annotation=annotation,
                    value=value,
                    inside=method,
                    node=node,
                )


def _says_something(member: Member) -> bool:
    return member.value is not None and not isinstance(member.value, ast.Constant)


def _walk(folder: Path) -> Iterator[tuple[Path, Path]]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name != "__pycache__":
            yield from _walk(path)
        elif path.suffix == ".py":
            yield folder, path
