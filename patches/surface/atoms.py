"""What an expression may be: the atoms that :mod:`inference` computes with. A type is a set of them."""

from __future__ import annotations

import dataclasses
from zlib import crc32

from elora_sglang.patches.surface.code import Class, Function, Module

Type = frozenset  # of the atoms below
EMPTY: frozenset[object] = frozenset()


@dataclasses.dataclass(frozen=True)
class Inst:
    """An instance of a class, or of one of its subclasses."""

    cls: Class


@dataclasses.dataclass(frozen=True)
class Cls:
    """The class itself."""

    cls: Class


@dataclasses.dataclass(frozen=True)
class Sup:
    """``super()`` in a method of ``cls``."""

    cls: Class


@dataclasses.dataclass(frozen=True)
class Fn:
    """A function; ``bound``: its first parameter is given already."""

    function: Function
    bound: bool = False


@dataclasses.dataclass(frozen=True)
class Mod:
    """A module."""

    module: Module


@dataclasses.dataclass(frozen=True)
class Str:
    """A constant string; as the name in ``getattr`` it leads to an attribute."""

    value: str

    def __hash__(self) -> int:  # the same in every process
        return crc32(self.value.encode())


@dataclasses.dataclass(frozen=True)
class Seq:
    """Anything that is iterated over: its elements, or for a tuple the type of each item."""

    of: frozenset[object]
    items: tuple[frozenset[object], ...] = ()


@dataclasses.dataclass(frozen=True)
class Map:
    """A mapping; with ``method`` the bound method of that name."""

    keys: frozenset[object]
    values: frozenset[object]
    method: str = ""

    def __hash__(self) -> int:
        return hash((self.keys, self.values, crc32(self.method.encode())))


def elements(type_: frozenset[object]) -> frozenset[object]:
    """What iterating over ``type_`` yields."""
    found: frozenset[object] = EMPTY
    for atom in type_:
        if isinstance(atom, Seq):
            found |= atom.of.union(*atom.items)
        elif isinstance(atom, Map) and not atom.method:
            found |= atom.keys
    return found
