"""What our code does with SGLang: imports, subclasses, overrides, hooks, calls, reads and writes.

Nothing is listed by hand. Subclasses and overridden methods are found in the source, reads through
:mod:`inference`, hooks through the patch records, whose targets also say what the hooks' parameters are.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from elora_sglang.patches.base import Kind, Patch, When
from elora_sglang.patches.surface.atoms import Cls, Fn, Inst, Mod, Seq, Str, Sup
from elora_sglang.patches.surface.code import Class, Code, Function, Member, Module
from elora_sglang.patches.surface.inference import OURS, Inference
from elora_sglang.patches.surface.ours import (
    call_shape,
    classes_of,
    is_ours,
    is_super,
    positional,
    sglang_bases,
    sglang_class,
    sglang_classes,
    takes_anything,
    with_self,
)
from elora_sglang.patches.surface.scopes import Scope
from elora_sglang.patches.surface.syntax import FunctionNode, Import, imports

SGLANG = "sglang"
#: Packages of ours that never see an SGLang object: the import rules forbid it.
_PURE = ("core",)

#: Which servers or programs need what a file uses; everything else is needed by ``--elora``.
_PARTS = {"eval": "eval", "frontend": "frontend", "platform": "cpu"}
PART_OF_RECORD = {When.FRONTEND: "frontend", When.CPU: "cpu"}
_EVAL_HOOKS = "elora_sglang.eval."
#: How a record touches its target, where that is no hook. A replaced class is guarded by each member that we override.
_HOW = {Kind.REGISTRY: "register", Kind.ATTRIBUTE: "write", Kind.REPLACE: "replace"}


@dataclasses.dataclass
class Use:
    """What we do with one SGLang name.

    Args:
        kinds: how it is used, e.g. ``import``, ``read``, ``call``, ``override``, ``hook``.
        users: our files, with the parts of ours that need it there (``elora``, ``cpu``, ``frontend``, ``eval``).
        calls: shapes of our calls, e.g. ``(2, key=)``; what the callee must go on accepting.
        passes_on: whether everything of ours that SGLang calls in its place takes any further argument.
    """

    kinds: set[str] = dataclasses.field(default_factory=set)
    users: dict[str, set[str]] = dataclasses.field(default_factory=lambda: defaultdict(set))
    calls: set[str] = dataclasses.field(default_factory=set)
    passes_on: bool = True


_NONE = Use()


def _unite(use: Use, other: Use) -> None:
    use.kinds |= other.kinds
    use.calls |= other.calls
    use.passes_on &= other.passes_on
    for file, parts in other.users.items():
        use.users[file] |= parts


class Uses:
    """All uses of SGLang in a tree of our source, by dotted SGLang name."""

    def __init__(self, code: Code, records: Iterable[Patch]) -> None:
        self.code = code
        self.records = tuple(records)
        self.found: dict[str, Use] = defaultdict(Use)
        #: Reads that SGLang's source does not show: (class, attribute, our file).
        self.unseen: set[tuple[str, str, str]] = set()
        self._written: set[str] = set()
        self._maybe: list[tuple[Class, str, str, str]] = []
        self.inference = Inference(code)

    def collect(self) -> Uses:
        """Read all of our code; returns self."""
        modules = [self.code.module(name) for name, _ in self.code.files(OURS) if not _is_pure(name)]
        scopes = [scope for module in modules if module is not None for scope in self._scopes(module)]
        self._type_hooks()
        self.inference.settle(scopes)
        self._record_hooks()
        for module in modules:
            if module is not None:
                self._imports(module)
                self._subclasses(module)
        for scope in scopes:
            self._expressions(scope)
        for cls, name, file, path in self._maybe:
            if name not in self._written and not cls.is_open:
                self.unseen.add((path, name, file))
        self._by_imported_name()
        return self

    def _by_imported_name(self) -> None:
        """Put what was found under the place of its definition under the name by which we import it."""
        imported: dict[str, str] = {}
        for path, use in self.found.items():
            thing = self.code.find(path) if use.kinds & {"import", "hook", "hook owner"} else None
            if (
                isinstance(thing, Class | Function)
                and thing.path != path
                and not self.found.get(thing.path, _NONE).kinds & {"import"}
            ):
                imported.setdefault(thing.path, path)
        for defined, path in imported.items():
            for old in [p for p in self.found if p == defined or p.startswith(defined + ".")]:
                _unite(self.found[path + old.removeprefix(defined)], self.found.pop(old))

    # -- our code ---------------------------------------------------------------------------------

    def _scopes(self, module: Module) -> Iterator[Scope]:
        yield from self._with_inner(self.inference.module_scope(module))
        for cls in classes_of(module):
            for member in cls.own.values():
                if member.function is not None:
                    yield from self._with_inner(self.inference.scope_of(member.function))
        for thing in module.names.values():
            if isinstance(thing, Function):
                yield from self._with_inner(self.inference.scope_of(thing))

    def _with_inner(self, scope: Scope) -> Iterator[Scope]:
        yield scope
        for node in scope.nodes:
            nested = isinstance(node, FunctionNode) and not isinstance(scope.node, ast.Module)
            if nested or isinstance(
                node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
            ):
                yield from self._with_inner(self.inference.inner_scope(node, scope))

    def _note(self, path: str, kind: str, module: Module, part: str | None = None) -> Use | None:
        if path.partition(".")[0] != SGLANG:
            return None
        use = self.found[path]
        use.kinds.add(kind)
        file = self.file_of(module)
        use.users[file].add(part or part_of(file))
        return use

    def file_of(self, module: Module) -> str:
        """Our file as the repository names it."""
        path = Path(*module.name.split(".")[1:])
        file = (path / "__init__.py" if module.is_package else path.with_suffix(".py")).as_posix()
        return file if file.startswith(("patches/", "eval/", "kernels/")) else f"{OURS}/{file}"

    # -- imports ----------------------------------------------------------------------------------

    def _imports(self, module: Module) -> None:
        for node, typing_only in _with_typing(module.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self._note(alias.name, "type" if typing_only else "import", module)
            elif isinstance(node, ast.ImportFrom):
                for _, bound in imports(module.name, module.is_package, node):
                    self._imported(bound, module, typing_only)

    def _imported(self, bound: Import, module: Module, typing_only: bool) -> None:
        if bound.module.partition(".")[0] == SGLANG and bound.name is not None:
            kind = "type" if typing_only else "import"
            self._note(bound.module, kind, module)
            self._note(f"{bound.module}.{bound.name}", kind, module)

    # -- classes ----------------------------------------------------------------------------------

    def _subclasses(self, module: Module) -> None:
        for cls in classes_of(module):
            bases = sglang_bases(cls)
            for base in bases:
                self._note(base.path, "subclass", module)
            for name, member in cls.own.items():
                self._override(name, member, bases, module)

    def _override(self, name: str, member: Member, bases: tuple[Class, ...], module: Module) -> None:
        base = next((b for b in bases if b.member(name) is not None), None)
        if base is None or (member.inside is not None and not (name.startswith("__") or member.function)):
            # What an __init__ of ours assigns is a write of an attribute that the base has.
            if base is not None:
                self._note(f"{base.path}.{name}", "write", module)
            return
        if name in ("__init__", "__doc__", "__slots__", "__module__"):
            if name == "__init__" and member.function is not None:
                use = self._note(f"{base.path}.__init__", "override", module)
                if use is not None:
                    use.passes_on &= takes_anything(member.function)
            return
        use = self._note(f"{base.path}.{name}", "override", module)
        if use is not None and member.function is not None:
            use.passes_on &= takes_anything(member.function)

    # -- hooks ------------------------------------------------------------------------------------

    def _type_hooks(self) -> None:
        """Tell the inference what a hook's parameters are: those of its target."""
        for record in self.records:
            target, hook = self.code.find(record.target), self.code.find(record.hook)
            target = target.function if isinstance(target, Member) else target
            if not isinstance(target, Function) or not isinstance(hook, Function):
                continue
            names = [a.arg for a in (*hook.node.args.posonlyargs, *hook.node.args.args)]
            given = self.inference.given
            if record.kind in (Kind.AFTER, Kind.AROUND) and names:
                first = (
                    self.inference.returned(target) if record.kind is Kind.AFTER else frozenset({Fn(target)})
                )
                given[hook.node, names.pop(0)] |= first
            theirs = self.inference.scope_of(target)
            owner = self.code.find(record.target.rpartition(".")[0])
            for number, (name, argument) in enumerate(zip(names, target.node.args.args, strict=False)):
                if number == 0 and isinstance(owner, Class) and not target.is_static:
                    given[hook.node, name] |= {(Cls if "classmethod" in target.decorators else Inst)(owner)}
                else:
                    given[hook.node, name] |= self.inference.name(argument.arg, theirs, theirs)

    def _record_hooks(self) -> None:
        for record in self.records:
            of_eval = record.hook.startswith(_EVAL_HOOKS)
            part = "eval" if of_eval else PART_OF_RECORD.get(record.when, "elora")
            module = self._record_module(record)
            kind = _HOW.get(record.kind, "hook")
            owner, _, _ = record.target.rpartition(".")
            self._note(owner, "hook owner", module, part)
            use = self._note(record.target, kind, module, part)
            hook = self.code.find(record.hook)
            if isinstance(hook, Function | Class):
                self._note(record.target, kind, hook.module, part)
            if use is not None and not (isinstance(hook, Function) and takes_anything(hook)):
                use.passes_on = False
            if use is not None and kind == "register":
                use.calls.add("(2)" if len(positional(self.code.find(record.target))) > 1 else "(1)")
            if record.registry:
                self._note(record.registry, "read", module, part)

    def _record_module(self, record: Patch) -> Module:
        """The file that states the record."""
        homes = (f"{OURS}.patches.", f"{OURS}.eval.baselines.")
        for name, loaded in list(sys.modules.items()):
            if name.startswith(homes) and record in (
                *getattr(loaded, "PATCHES", ()),
                getattr(loaded, "PATCH", None),
            ):
                module = self.code.module(name)
                if module is not None:
                    return module
        module = self.code.module(f"{OURS}.patches.base")
        assert module is not None
        return module

    # -- expressions ------------------------------------------------------------------------------

    def _expressions(self, scope: Scope) -> None:
        for node in scope.nodes:
            if isinstance(node, ast.Attribute):
                kind = "read" if isinstance(node.ctx, ast.Load) else "write"
                self._touch_all(self.inference.of(node.value, scope), node.attr, kind, scope)
            elif isinstance(node, ast.Call):
                self._call(node, scope)

    def _touch_all(self, atoms: Iterable[object], name: str, kind: str, scope: Scope) -> None:
        """A read or write of an attribute of one of ``atoms``: those that have it are meant."""
        atoms = list(atoms)
        seen = [self._touch(atom, name, kind, scope) for atom in atoms]
        if any(seen) or name.startswith("__"):
            return
        for atom in atoms:
            if isinstance(atom, Inst | Cls) and sglang_classes(atom.cls):
                found = [c for c in self._subclasses_of(atom.cls) if c.member(name) is not None]
                for cls in found:
                    self._touch(Inst(cls), name, kind, scope)
                if not found:
                    self._maybe.append((atom.cls, name, self.file_of(scope.module), atom.cls.path))

    def _subclasses_of(self, cls: Class) -> list[Class]:
        """Classes of the same file that derive from an SGLang class, and those of ours that replace it."""
        beside = [c for c in classes_of(cls.module) if cls in c.mro[1:]]
        hooks = (
            self.code.find(r.hook) for r in self.records if r.kind is Kind.REPLACE and r.target == cls.path
        )
        return [*beside, *(c for c in hooks if isinstance(c, Class))]

    def _touch(self, atom: object, name: str, kind: str, scope: Scope) -> bool:
        """Note what is SGLang's; whether the object has such an attribute, SGLang's or ours."""
        if isinstance(atom, Mod) and atom.module.name.partition(".")[0] == SGLANG:
            self._note(f"{atom.module.name}.{name}", kind, scope.module)
            return True
        if not isinstance(atom, Inst | Cls | Sup):
            return not isinstance(atom, Str | Seq | Fn)
        owner = sglang_class(atom, name)
        if owner is not None:
            self._note(f"{owner.path}.{name}", kind, scope.module)
            self._note(owner.path, "type", scope.module)
        elif kind == "write":
            self._written.add(name)
        return owner is not None or kind == "write" or self.inference.member_of(atom, name) is not None

    def _call(self, node: ast.Call, scope: Scope) -> None:
        shape = call_shape(node)
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name in ("getattr", "hasattr", "setattr", "delattr") and len(node.args) > 1:
            surely = name == "getattr" and len(node.args) == 2
            kind = "read" if surely else "write" if name in ("setattr", "delattr") else "probe"
            for attribute in self.inference.strings(node.args[1], scope):
                atoms = self.inference.of(node.args[0], scope)
                if kind == "probe":  # it may not be there, and where it is not, nothing is read
                    atoms = frozenset(
                        a for a in atoms if isinstance(a, Inst | Cls) and sglang_class(a, attribute)
                    )
                self._touch_all(atoms, attribute, kind, scope)
        for atom in self.inference.of(node.func, scope):
            if isinstance(atom, Fn):
                self._called(atom, node, shape, scope)
            elif isinstance(atom, Cls):
                self._constructed(atom.cls, shape, scope)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else name
        if (
            name in ("import_module", "resolve_name")
            and node.args
            and self.inference.is_constant(node.args[0], scope)
        ):
            for path in self.inference.strings(node.args[0], scope):
                if self.code.find(path) is not None:
                    self._note(path, "import", scope.module)

    def _called(self, atom: Fn, node: ast.Call, shape: str, scope: Scope) -> None:
        function = atom.function
        paths = {function.path}
        if function.owner is not None and isinstance(node.func, ast.Attribute):
            # By the class that we call it on: a move between its bases changes nothing for us.
            receivers = self.inference.of(node.func.value, scope)
            owners = (sglang_class(a, function.name) for a in receivers if isinstance(a, Inst | Cls | Sup))
            paths = {f"{owner.path}.{function.name}" for owner in owners if owner is not None} or paths
        if function.module.name.partition(".")[0] != SGLANG:
            return
        for path in paths:
            if self.code.find(path) is None:
                continue  # a function inside of another
            use = self._note(path, "super" if is_super(node) else "call", scope.module)
            if use is not None:
                use.calls.add(shape if not atom.bound or function.owner is None else with_self(shape))
        if function.node.args.kwarg is not None:
            self._fields_by_keyword(function, node, scope)

    def _fields_by_keyword(self, function: Function, node: ast.Call, scope: Scope) -> None:
        """Keywords that a function takes as ``**fields`` of the arguments object it is given."""
        known = {a.arg for a in (*function.node.args.args, *function.node.args.kwonlyargs)}
        names = [k.arg for k in node.keywords if k.arg is not None and k.arg not in known]
        first = function.node.args.args[:1]
        scope_of_target = self.inference.scope_of(function)
        for argument in first:
            for atom in self.inference.name(argument.arg, scope_of_target, scope_of_target):
                if isinstance(atom, Inst):
                    for name in names:
                        self._touch(atom, name, "write", scope)

    def _constructed(self, cls: Class, shape: str, scope: Scope) -> None:
        member = cls.member("__init__")
        if member is not None and is_ours(member.owner):
            return
        target = cls if not is_ours(cls) else next(iter(sglang_bases(cls)), None)
        if target is None:
            return
        use = self._note(target.path, "call", scope.module)
        if use is not None:
            use.calls.add(with_self(shape))


# -- small questions about our code and calls ---------------------------------------------------------


def part_of(file: str) -> str:
    """Which part of ours a file belongs to: ``elora``, ``cpu``, ``frontend`` or ``eval``."""
    parts = file.split("/")
    return _PARTS.get(parts[0], _PARTS.get(parts[1] if len(parts) > 1 else "", "elora"))


def _is_pure(name: str) -> bool:
    parts = name.split(".")
    return len(parts) > 1 and parts[1] in _PURE


def _with_typing(tree: ast.Module) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes, and whether they are only there for the type checker."""
    stack: list[tuple[ast.AST, bool]] = [(tree, False)]
    while stack:
        node, typing_only = stack.pop()
        yield node, typing_only
        guarded = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        body = set(node.body) if isinstance(node, ast.If) else set()
        stack += [(child, typing_only or (guarded and child in body)) for child in ast.iter_child_nodes(node)]
