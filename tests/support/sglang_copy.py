"""A copy of the SGLang files that ``patches/surface.json`` depends on, in which changes are planted."""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elora_sglang.patches.surface import place, record
from elora_sglang.patches.surface.changes import Comparison, compare
from elora_sglang.patches.surface.code import Class, Code, Function, Member, Value
from elora_sglang.patches.surface.shape import Shape
from elora_sglang.patches.surface.uses import SGLANG


class SGLangCopy:
    """The installed SGLang as far as we lean on it, under ``folder``/sglang, as ``version``. Tests may change its
    files.
    """

    def __init__(self, folder: Path, version: str = "0.5.23") -> None:
        self.package = folder / SGLANG
        (folder / f"{SGLANG}-{version}.dist-info").mkdir()
        self.surface = record.stored()
        self.original = place.installed()
        for name in self.surface.files:
            target = self.package / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.original / name, target)
        self._shapes: dict[str, Shape | None] = {p: e.shape for p, e in self.surface.entries.items()}

    def compare(self) -> Comparison:
        """What ``--diff`` finds between the stored surface and this copy."""
        return compare(self.surface.entries, self._shapes, Code({SGLANG: self.package}))

    @contextmanager
    def planted(self) -> Iterator[Plant]:
        """Changes that are taken back at the end of the block."""
        plant = Plant(self.package)
        try:
            yield plant
        finally:
            plant.take_back()


class Plant:
    """One change of the copy: text against text, or by the name of what is changed."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self._before: dict[Path, str | None] = {}

    def file(self, module: str) -> Path:
        """The file of a module of the copy."""
        found = Code({SGLANG: self.package}).module(module)
        assert found is not None, module
        return found.path

    def write(self, path: Path, text: str) -> None:
        """Write a file of the copy; it is as before once the block ends."""
        self._before.setdefault(path, path.read_text() if path.exists() else None)
        path.write_text(text)

    def remove(self, module: str) -> None:
        """Delete a module's file."""
        path = self.file(module)
        self._before.setdefault(path, path.read_text())
        path.unlink()

    def replace(self, module: str, old: str, new: str) -> None:
        """Replace all of ``old``, which must be there."""
        path = self.file(module)
        text = path.read_text()
        assert old in text, f"{old!r} is not in {module}"
        self.write(path, text.replace(old, new))

    def source(self, name: str) -> tuple[Path, str, str]:
        """File, whole text and the definition's own text, decorators included."""
        code = Code({SGLANG: self.package})
        found = code.find(name)
        node: ast.AST | None
        if isinstance(found, Member):
            path, node = found.owner.module.path, found.node
        else:
            assert isinstance(found, Class | Function | Value), name
            path, node = found.module.path, found.node
        assert node is not None
        lines = path.read_text().splitlines(keepends=True)
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(d.lineno for d in decorators)])  # type: ignore[attr-defined]
        return path, "".join(lines), "".join(lines[first - 1 : node.end_lineno])  # type: ignore[attr-defined]

    def edit(self, name: str, pattern: str, new: str) -> None:
        """Replace the first match of a pattern in the definition of ``name``; there must be one."""
        path, whole, own = self.source(name)
        edited, count = re.subn(pattern, new, own, count=1, flags=re.S)
        assert count == 1, f"{pattern!r} is not in the source of {name}"
        assert whole.count(own) == 1
        self.write(path, whole.replace(own, edited))

    def move(self, name: str, module: str, *, keep_importable: bool) -> None:
        """Move a top-level definition to a new module, which imports all that its old one has."""
        path, whole, own = self.source(name)
        old, _, last = name.rpartition(".")
        new = self.package.joinpath(*module.split(".")[1:]).with_suffix(".py")
        self.write(new, f"from {old} import *\n\n\n{own}")
        self.write(path, whole.replace(own, f"from {module} import {last}\n" if keep_importable else ""))

    def into_class(self, name: str) -> None:
        """Make a function the method of a new class."""
        path, whole, own = self.source(name)
        self.write(path, whole.replace(own, "class QuiteNew:\n" + textwrap.indent(own, "    ")))

    def take_back(self) -> None:
        """Undo everything."""
        for path, text in self._before.items():
            if text is None:
                path.unlink()
            else:
                path.write_text(text)
        self._before.clear()
