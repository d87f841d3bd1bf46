"""Records of the places where ELORA touches SGLang, and how to find them.

A *patch* is data, not code: which SGLang object, how it is touched, which callable of
:mod:`elora_sglang.integration` does it, why, and what would make the patch unnecessary. Every module in
this folder that defines ``PATCH`` or ``PATCHES`` is found by being here. Nothing in this module imports
sglang; :mod:`elora_sglang.integration.plugin.install` installs records and
:mod:`elora_sglang.integration.plugin.verify` checks that they took.

``targets.json`` keeps what each target looked like when it was last read: its parameters and the SHA-256 of
its source. ``python -m elora_sglang.patches.table --refresh`` rewrites it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import importlib
import inspect
import json
import pkgutil
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: SGLang versions that every record of this release was written against.
SUPPORTED_SGLANG = ">=0.5.23,<0.5.24"

FOLDER = Path(__file__).resolve().parent
MANIFEST = FOLDER / "targets.json"


class Kind(enum.Enum):
    """How a target is touched; the first four are SGLang's own hook types (``plugins/hook_registry.py``)."""

    BEFORE = "before"  # hook(*args, **kwargs) -> (args, kwargs) or None
    AFTER = "after"  # hook(result, *args, **kwargs) -> result or None
    AROUND = "around"  # hook(original, *args, **kwargs) -> result
    REPLACE = "replace"  # the hook is the new class or function
    REGISTRY = "registry"  # the target is a function that registers the hook under `key`
    ATTRIBUTE = "attribute"  # hook(value) -> the new value of a class attribute


class Process(enum.Enum):
    """Where the hook has to be in place."""

    MAIN = "main"  # the launcher, before arguments are parsed
    TOKENIZER = "tokenizer"  # the launcher again: it is the tokenizer process, once arguments are resolved
    SCHEDULER = "scheduler"  # every scheduler process, before it reads its configuration
    CLIENT = "client"  # programs of SGLang's frontend language; no server process
    ALL = "all"


class When(enum.Enum):
    """For which servers the hook is installed."""

    ALWAYS = "always"
    ELORA = "with --elora"
    CPU = "on the elora CPU platform"  # for stock SGLang and --elora alike
    FRONTEND = "after import elora_sglang.frontend"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patch:
    """One touched place in SGLang.

    Args:
        name: unique short name, used in messages and in the table.
        target: dotted path of the touched object, or for ``REGISTRY`` of the registering function.
        kind: how it is touched.
        hook: dotted path of the callable, below ``elora_sglang``.
        why: one sentence.
        upstream: link to the SGLang issue, pull request or file that this is about.
        remove_when: what would make the record unnecessary.
        process: where the hook has to be.
        when: for which servers it is installed.
        key: for ``REGISTRY``, the name to register under.
        registry: for ``REGISTRY``, dotted path of the dict that shows what is registered.
        sglang: version range the record is valid for.
    """

    name: str
    target: str
    kind: Kind
    hook: str
    why: str
    upstream: str
    remove_when: str
    process: Process = Process.SCHEDULER
    when: When = When.ELORA
    key: str | None = None
    registry: str | None = None
    sglang: str = SUPPORTED_SGLANG

    def __post_init__(self) -> None:
        if not self.target.startswith("sglang."):
            raise ValueError(f"patch {self.name}: target {self.target!r} is not inside sglang")
        if not self.hook.startswith("elora_sglang."):
            raise ValueError(f"patch {self.name}: hook {self.hook!r} is not inside elora_sglang")
        if (self.kind is Kind.REGISTRY) != bool(self.key and self.registry):
            raise ValueError(
                f"patch {self.name}: `key` and `registry` belong to kind REGISTRY, and only there"
            )
        for field in ("name", "why", "upstream", "remove_when"):
            if not getattr(self, field).strip():
                raise ValueError(f"patch {self.name or self.target}: `{field}` is empty")

    def load_hook(self) -> Any:
        """Import and return the hook. Raises ImportError or AttributeError when it is not there."""
        return pkgutil.resolve_name(self.hook)

    def load_target(self) -> Any:
        """Import the target's module and return the target as it is now, hooks included."""
        return pkgutil.resolve_name(self.target)


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a target looks like: its parameters and the SHA-256 of its source text."""

    signature: str
    sha256: str


def signature_of(target: Any) -> str:
    """Parameters of a callable or of a class's constructor, without annotations, so that one Python
    version prints the same as the next: ``(self, req, *, limit=...)``."""
    original = inspect.unwrap(target)
    parameters = inspect.signature(original.__init__ if inspect.isclass(original) else original).parameters
    bare = [
        p.replace(
            annotation=inspect.Parameter.empty,
            default=p.empty if p.default is p.empty else _Elided(),
        )
        for p in parameters.values()
    ]
    return str(inspect.Signature(bare))


class _Elided:
    """Stands for a default value: that there is one matters, how it prints does not."""

    def __repr__(self) -> str:
        return "..."


def fingerprint(target: Any) -> Fingerprint:
    """Fingerprint of the original behind ``target``, looking through hooks that wrap it."""
    original = inspect.unwrap(target)
    source = "\n".join(line.rstrip() for line in inspect.getsource(original).splitlines())
    return Fingerprint(signature_of(original), hashlib.sha256(source.encode()).hexdigest())


@functools.cache
def manifest(path: Path = MANIFEST) -> dict[str, Fingerprint]:
    """The stored fingerprints, by dotted path: of every target, and of what a replacing class overrides."""
    return {target: Fingerprint(**entry) for target, entry in json.loads(path.read_text()).items()}


def write_manifest(patches: Iterable[Patch], path: Path = MANIFEST) -> None:
    """Read every target in the installed SGLang and store its fingerprint. Imports all of them."""
    seen = {
        name: dataclasses.asdict(fingerprint(target))
        for patch in patches
        for name, target in touched(patch).items()
    }
    path.write_text(json.dumps(seen, indent=1, sort_keys=True) + "\n")
    manifest.cache_clear()


def touched(patch: Patch) -> dict[str, Any]:
    """What a record touches in the installed SGLang, by dotted path: its target and, for a class that a subclass
    replaces, each member that the subclass overrides.

    Imports target and hook. Raises ImportError or AttributeError when one of them is not there.
    """
    target = patch.load_target()
    hook = patch.load_hook() if patch.kind is Kind.REPLACE else None
    if not inspect.isclass(hook) or not inspect.isclass(target):
        return {patch.target: target}
    if target is hook:
        target = stock_class(hook)
    members = {f"{patch.target}.{name}": getattr(target, name) for name in overrides(hook)}
    return {patch.target: target, **members}


def stock_class(ours: type) -> type:
    """SGLang's class that ``ours`` extends. Raises ValueError when there is none."""
    for base in ours.__mro__:
        if base.__module__.startswith("sglang."):
            return base
    raise ValueError(f"{ours.__qualname__} extends no class of SGLang")


def overrides(ours: type) -> tuple[str, ...]:
    """Names of the functions with which ``ours`` overrides a member of SGLang's class, in order of definition."""
    stock = stock_class(ours)
    own = ours.__mro__[: ours.__mro__.index(stock)]
    names = {
        name: None
        for base in own
        for name, value in vars(base).items()
        if inspect.isfunction(value) and hasattr(stock, name) and not hasattr(object, name)
    }
    return (*(("__init__",) if any("__init__" in vars(base) for base in own) else ()), *names)


def discover() -> tuple[Patch, ...]:
    """All records, sorted by name. Raises ValueError on two records of one name."""
    found: dict[str, Patch] = {}
    for module_info in pkgutil.iter_modules([str(FOLDER)]):
        module = importlib.import_module(f"elora_sglang.patches.{module_info.name}")
        single = getattr(module, "PATCH", None)
        for patch in (*getattr(module, "PATCHES", ()), *([single] if single is not None else ())):
            if patch.name in found:
                raise ValueError(
                    f"two patches are called {patch.name!r}; rename the one in {module.__file__}"
                )
            found[patch.name] = patch
    return tuple(found[name] for name in sorted(found))


def serving(patches: tuple[Patch, ...]) -> tuple[Patch, ...]:
    """The records that a server with ``--elora`` has in place: the measure of how much of SGLang is touched."""
    return tuple(p for p in patches if p.when in (When.ALWAYS, When.ELORA))


def select(patches: tuple[Patch, ...], *, process: set[Process], when: set[When]) -> tuple[Patch, ...]:
    """The records for these processes and kinds of server; ``Process.ALL`` belongs to every process."""
    wanted = process | {Process.ALL}
    return tuple(p for p in patches if p.process in wanted and p.when in when)


def rebind(old: Any, new: Any, keep: str | None = None) -> None:
    """Replace ``old`` by ``new`` in every module that had imported it by name, but not under the name ``keep``."""
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType):
            for name, value in list(vars(module).items()):
                if value is old and name != keep:
                    setattr(module, name, new)
