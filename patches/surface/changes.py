"""Two SGLangs compared, as far as we lean on them: what a release breaks for us, and what to look at."""

from __future__ import annotations

import ast
import dataclasses
import enum
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from elora_sglang.patches.surface.code import Code
from elora_sglang.patches.surface.record import Entry
from elora_sglang.patches.surface.shape import Shape, describe
from elora_sglang.patches.surface.syntax import without_collection
from elora_sglang.patches.surface.uses import SGLANG

_CALLABLE = frozenset({"function", "class", "method", "staticmethod", "classmethod"})
_READABLE = frozenset({"attribute", "property", "value"})
_DEFINITION = re.compile(r"^(?:class|(?:async )?def)\s+(\w+)|^(\w+)\s*(?::[^=\n]+)?=", re.MULTILINE)


class Verdict(enum.Enum):
    """What a change means for our code as it is."""

    BREAKS = "breaks"  # it fails, or a hook of ours would not be reached
    LOOK = "look at"  # it runs, but what it was written against is another


@dataclasses.dataclass(frozen=True)
class Change:
    """One difference that concerns us.

    Args:
        name: the SGLang name.
        what: ``gone``, ``moved``, ``kind changed``, ``new required argument``, ``default removed``, ``signature
            changed``, ``base changed``, ``new abstract method``, ``source changed``, ``type changed`` or ``value
            changed``.
        detail: before and after, in short.
        verdict: whether it breaks us.
        parts: what of ours needs it, see :class:`record.Entry`.
        users: our files.
    """

    name: str
    what: str
    detail: str
    verdict: Verdict
    parts: tuple[str, ...]
    users: tuple[str, ...]

    @property
    def breaks(self) -> bool:
        return self.verdict is Verdict.BREAKS

    @property
    def line(self) -> str:
        """One line for people."""
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.name}: {self.what}{detail} (used in {', '.join(self.users)})"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All changes, worst first, and how many entries are as they were."""

    changes: tuple[Change, ...]
    unchanged: int
    #: Names that neither side has: what we use of a later SGLang.
    absent: tuple[str, ...] = ()

    @property
    def breaking(self) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.breaks)

    @property
    def summary(self) -> str:
        breaks = len(self.breaking)
        text = f"breaks: {breaks}, look at: {len(self.changes) - breaks}, unchanged: {self.unchanged}"
        return text + (f", in neither: {len(self.absent)}" if self.absent else "")


@without_collection
def compare(entries: Mapping[str, Entry], old: Mapping[str, Shape | None], code: Code) -> Comparison:
    """What of ``entries`` is another in ``code`` than it was in ``old``."""
    finder = _Finder(code)
    defined = frozenset(path for path, entry in entries.items() if entry.uses("override"))
    changes: list[Change] = []
    absent = []
    unchanged = 0
    for path, entry in entries.items():
        before, now = old.get(path), describe(code, path)
        if before is None:
            if now is None:
                absent.append(path)
            else:
                unchanged += 1
            continue
        if now is None:
            found = list(_absent(path, entry, before, finder))
        else:
            found = list(_changed(path, entry, before, now, defined))
        changes += found
        unchanged += not found
    order = sorted(changes, key=lambda change: (not change.breaks, change.name, change.what))
    return Comparison(tuple(order), unchanged, tuple(absent))


# -- what is not there any more ------------------------------------------------------------------------


def _absent(path: str, entry: Entry, before: Shape, finder: _Finder) -> Iterator[Change]:
    owner, _, name = path.rpartition(".")
    if before.kind in ("class", "function", "value", "module"):
        places = finder.top_level(name) if before.kind != "module" else finder.modules(name)
        detail = f"now {' or '.join(places)}" if 0 < len(places) <= 3 else ""
        yield _change(path, entry, "moved" if detail else "gone", detail)
        return
    if describe(finder.code, owner) is None:
        # The class is reported by itself; here it is asked whether the member moved with it.
        for place in finder.top_level(owner.rpartition(".")[2]):
            shape = describe(finder.code, f"{place}.{name}")
            if shape is not None:
                yield from _changed(path, entry, before, dataclasses.replace(shape, defined=before.defined))
                return
    yield _change(path, entry, "gone", f"{before.kind} of {owner.rpartition('.')[2]}")


def _change(path: str, entry: Entry, what: str, detail: str, *, breaks: bool | None = None) -> Change:
    verdict = Verdict.BREAKS if (entry.needed if breaks is None else breaks) else Verdict.LOOK
    return Change(path, what, detail, verdict, entry.parts, entry.users)


# -- what is there, but another ------------------------------------------------------------------------


def _changed(
    path: str, entry: Entry, before: Shape, now: Shape, defined: frozenset[str] = frozenset()
) -> Iterator[Change]:
    """``defined``: the methods of SGLang that classes of ours define."""
    if before.kind != now.kind and not {before.kind, now.kind} <= _READABLE:
        yield _change(path, entry, "kind changed", f"{before.kind} -> {now.kind}")
        return
    if (
        entry.uses("hook", "replace")
        and before.kind in ("class", "function")
        and before.defined != now.defined
    ):
        # SGLang's registry replaces the name where we name it; its users read it where it is defined.
        yield _change(
            path, entry, "moved", f"defined in {now.defined}, a hook on {path} would not be reached"
        )
    written = entry.uses("write") and before.kind == "attribute" and now.kind == "property"
    if written:
        yield _change(path, entry, "kind changed", "attribute -> property, and we write it", breaks=True)
    signature = _signature(path, entry, before, now)
    if signature is not None:
        yield signature
    if entry.uses("subclass"):
        yield from _bases(path, entry, before, now, defined)
    if before.sha256 and before.sha256 != now.sha256 and signature is None:
        yield _change(path, entry, "source changed", _how(entry), breaks=False)
    if before.type and before.type != now.type and before.kind in _READABLE:
        what = "value changed" if before.kind == "value" or before.type.startswith("= ") else "type changed"
        yield _change(path, entry, what, f"{before.type} -> {now.type or 'none stated'}", breaks=False)


def _how(entry: Entry) -> str:
    names = {"hook": "we hook it", "override": "we override it", "super": "we call it by super()"}
    return ", ".join(text for kind, text in names.items() if entry.uses(kind))


def _bases(path: str, entry: Entry, before: Shape, now: Shape, defined: frozenset[str]) -> Iterator[Change]:
    if before.bases != now.bases:
        yield _change(
            path,
            entry,
            "base changed",
            f"({', '.join(before.bases)}) -> ({', '.join(now.bases)})",
            breaks=False,
        )
    for name in sorted({*now.abstract} - {*before.abstract}):
        if f"{path}.{name}" in defined:
            continue
        yield _change(
            path, entry, "new abstract method", f"{name}, which a subclass has to define", breaks=True
        )


def _signature(path: str, entry: Entry, before: Shape, now: Shape) -> Change | None:
    if not before.signature or before.signature == now.signature:
        return None
    if not now.signature:
        return _change(
            path, entry, "signature changed", f"{before.signature} -> not shown by its source", breaks=False
        )
    fitting = (call for call in entry.calls if binds(before.signature, call))
    failing = [call for call in fitting if not binds(now.signature, call)]
    required = _required(now.signature) - _names(before.signature)
    more = len(_required(now.signature)) > len(_required(before.signature))
    what = "signature changed"
    if required and more:
        what = f"new required argument {', '.join(sorted(required))}"
    elif lost := (_required(now.signature) & _names(before.signature)) - _required(before.signature):
        what = f"default removed of {', '.join(sorted(lost))}"
    detail = _difference(before.signature, now.signature)
    if failing:
        detail += f"; our call {failing[0]} fails"
    only_more = not required and _accepts_as_before(before.signature, now.signature)
    stands_in = entry.uses("hook") or (entry.uses("override") and not (only_more and entry.passes_on))
    return _change(path, entry, what, detail, breaks=bool(failing) or stands_in)


# -- signatures as text --------------------------------------------------------------------------------


def _arguments(signature: str) -> ast.arguments:
    function = ast.parse(f"def f{signature}: pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


def _names(signature: str) -> set[str]:
    arguments = _arguments(signature)
    return {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


def _required(signature: str) -> set[str]:
    arguments = _arguments(signature)
    positional = [*arguments.posonlyargs, *arguments.args]
    required = positional[: len(positional) - len(arguments.defaults)]
    named = [a for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None]
    return {a.arg for a in (*required, *named)}


def _difference(before: str, now: str) -> str:
    """Both signatures, or of long ones the parameters that differ."""
    if len(before) + len(now) <= 160:
        return f"{before} -> {now}"
    old, new = (text[1:-1].split(", ") for text in (before, now))
    parts = [f"without {', '.join(p for p in old if p not in new)}"] if {*old} - {*new} else []
    parts += [f"with {', '.join(p for p in new if p not in old)}"] if {*new} - {*old} else []
    return "; ".join(parts) or "another order of parameters"


def _accepts_as_before(before: str, now: str) -> bool:
    """Whether every call of the former signature is one of the new."""
    old, new = _arguments(before), _arguments(now)
    first = [a.arg for a in (*old.posonlyargs, *old.args)]
    same = [a.arg for a in (*new.posonlyargs, *new.args)][: len(first)] == first
    keeps = _names(before) <= _names(now) and _required(now) <= _required(before)
    stars = (old.vararg is None or new.vararg is not None) and (old.kwarg is None or new.kwarg is not None)
    return same and keeps and stars


def binds(signature: str, call: str) -> bool:
    """Whether a call of this shape fits a signature; what a ``*`` or ``**`` brings is taken to fit.

    >>> binds("(self, a, *, b=...)", "(2, b=)"), binds("(self, a, b)", "(2)")
    (True, False)
    """
    count, *rest = call[1:-1].split(", ")
    stars = "*" in rest or "**" in rest
    keywords = {part[:-1] for part in rest if part.endswith("=")}
    arguments = _arguments(signature)
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    if int(count) > len(positional) and arguments.vararg is None:
        return False
    taken = set(positional[: int(count)])
    if keywords & taken or (not keywords <= _names(signature) and arguments.kwarg is None):
        return False
    return stars or _required(signature) <= taken | keywords


# -- where something went ------------------------------------------------------------------------------


class _Finder:
    """Top-level definitions of a whole SGLang by name; read once, when something is missing."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self._index: dict[str, list[str]] | None = None

    def top_level(self, name: str) -> list[str]:
        """Dotted paths of the definitions of ``name``."""
        if self._index is None:
            self._index = defaultdict(list)
            for module, path in self.code.files(SGLANG):
                for match in _DEFINITION.finditer(_text(path)):
                    self._index[match[1] or match[2]].append(f"{module}.{match[1] or match[2]}")
        return sorted(set(self._index.get(name, ())))

    def modules(self, name: str) -> list[str]:
        """Modules of this last name."""
        return sorted(module for module, _ in self.code.files(SGLANG) if module.rpartition(".")[2] == name)


def _text(path: Path) -> str:
    return path.read_text(errors="replace")
