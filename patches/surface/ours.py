"""Small questions about our classes, functions and calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from elora_sglang.patches.surface.atoms import Cls, Inst, Sup
from elora_sglang.patches.surface.code import Class, Found, Function, Module
from elora_sglang.patches.surface.inference import OURS


def is_ours(cls: Class) -> bool:
    """Whether a class is defined in our package."""
    return cls.module.name.partition(".")[0] == OURS


def classes_of(module: Module) -> Iterator[Class]:
    """The module's classes, nested ones included."""
    stack = [thing for thing in module.names.values() if isinstance(thing, Class)]
    while stack:
        cls = stack.pop()
        yield cls
        stack += [member.nested for member in cls.own.values() if member.nested is not None]


def sglang_bases(cls: Class) -> tuple[Class, ...]:
    """SGLang's classes that ours, or a base of ours that is ours as well, names as bases."""
    if not is_ours(cls):
        return ()
    return tuple(dict.fromkeys(base for c in cls.mro if is_ours(c) for base in c.bases if not is_ours(base)))


def sglang_classes(cls: Class) -> tuple[Class, ...]:
    """The SGLang classes that an instance of ``cls`` is of; none for one of ours alone."""
    return sglang_bases(cls) if is_ours(cls) else (cls,)


def sglang_class(atom: Inst | Cls | Sup, name: str) -> Class | None:
    """The SGLang class by which we mean the member: None when it is ours, or nobody's."""
    if isinstance(atom, Inst | Cls):
        found = atom.cls.member(name)
        if (
            found is not None
            and is_ours(found.owner)
            and not any(
                name in c.own
                for base in sglang_classes(atom.cls)
                for c in base.mro
                if found.inside is not None
            )
        ):
            return None
    classes = (base.seen_through for base in sglang_classes(atom.cls))
    return next((base for base in classes if base.member(name) is not None), None)


def takes_anything(function: Function) -> bool:
    """Whether a function accepts further arguments, by position and by keyword."""
    return function.node.args.vararg is not None and function.node.args.kwarg is not None


def positional(thing: Found | None) -> list[ast.arg]:
    """Parameters of a function that may be given by position."""
    return [*thing.node.args.posonlyargs, *thing.node.args.args] if isinstance(thing, Function) else []


def call_shape(node: ast.Call) -> str:
    """How a call passes its arguments: ``(2, key=, **)`` for two by position, one by name and more of those."""
    stars = any(isinstance(a, ast.Starred) for a in node.args)
    count = sum(not isinstance(a, ast.Starred) for a in node.args)
    keywords = sorted(f"{k.arg}=" for k in node.keywords if k.arg is not None)
    double = any(k.arg is None for k in node.keywords)
    return f"({', '.join([str(count), *(['*'] if stars else []), *keywords, *(['**'] if double else [])])})"


def with_self(shape: str) -> str:
    """The shape of a call of a bound method, the object counted."""
    first, separator, rest = shape[1:-1].partition(", ")
    return f"({int(first) + 1}{separator}{rest})"


def is_super(node: ast.Call) -> bool:
    """Whether a call is ``super().method(...)``."""
    function = node.func
    return (
        isinstance(function, ast.Attribute)
        and isinstance(function.value, ast.Call)
        and ast.unparse(function.value.func) == "super"
    )
