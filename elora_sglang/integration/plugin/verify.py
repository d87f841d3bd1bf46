"""Fail closed: with ``--elora`` every hook is in place, or the server does not start.

SGLang's plugin loader logs a failing hook and serves on without it, which would be stock behaviour under
ELORA's name. So the targets are checked before the hooks are installed, and the hooks after SGLang
applied them: in the launcher, at the start of every scheduler process, and again when the scheduler
builds its prefix cache.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import pkgutil
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any, NoReturn

from packaging.specifiers import SpecifierSet

from elora_sglang.integration.plugin import config
from elora_sglang.integration.plugin.install import name_of, out_of_place
from elora_sglang.patches.base import (
    Fingerprint,
    Kind,
    Patch,
    Process,
    When,
    discover,
    fingerprint,
    manifest,
    overrides,
    select,
    signature_of,
    stock_class,
    touched,
)
from elora_sglang.patches.surface import start

logger = logging.getLogger(__name__)

_REFRESH = "python -m elora_sglang.patches.table --refresh"

#: Attribute by which a worker says the class of the scheduler that made it.
MARK = "elora_scheduler"


class Refused(SystemExit):
    """The server does not start; the message is one line. Not swallowed by ``except Exception``."""

    def __init__(self, message: str) -> None:
        super().__init__(f"elora: {message}")


@dataclasses.dataclass(frozen=True)
class TargetState:
    """What a check of one record found; ``problem`` is one line that names the target, or empty."""

    patch: Patch
    found: bool = False
    signature_ok: bool = False
    hash_ok: bool = False
    hook_ok: bool = False
    version_ok: bool = False
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether the hook can be installed. A changed source alone is a warning, not a fault."""
        return self.found and self.signature_ok and self.hook_ok and self.version_ok


def sglang_version() -> str:
    """Version of the installed SGLang; ``none`` when it is not installed."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "none"


def version_allowed(allowed: str, version: str) -> bool:
    """Whether ``version`` lies in the range ``allowed``; ``none`` never does."""
    return version != "none" and SpecifierSet(allowed).contains(version, prereleases=True)


def check_target(patch: Patch, known: Mapping[str, Fingerprint] | None = None) -> TargetState:
    """Compare a record with the installed SGLang. Imports the target's module; changes nothing.

    Args:
        patch: the record.
        known: fingerprints to compare with; default those of ``patches/targets.json``.
    """
    version = sglang_version()
    state = TargetState(patch, version_ok=version_allowed(patch.sglang, version))
    if not state.version_ok:
        return dataclasses.replace(
            state,
            problem=f"patch {patch.name} of {patch.target} was written for SGLang {patch.sglang}, "
            f"installed is {version}; install a supported SGLang or a newer elora-sglang",
        )
    try:
        patch.load_target()
        if patch.registry:
            Patch.load_target(dataclasses.replace(patch, target=patch.registry))
    except (ImportError, AttributeError) as error:
        return dataclasses.replace(state, problem=f"{patch.target} is not in SGLang {version}: {error}")
    state = dataclasses.replace(state, found=True)
    try:
        hook_problem = _hook_problem(patch, patch.load_hook())
    except Exception as error:
        hook_problem = f"hook {patch.hook} of {patch.target} cannot be imported: {error}"
    if hook_problem:
        return dataclasses.replace(state, problem=hook_problem)
    problem, changed = _compare(patch, manifest() if known is None else known)
    if changed and not problem:
        problem = f"source of {', '.join(changed)} differs from the one that was read"
        return dataclasses.replace(state, hook_ok=True, signature_ok=True, problem=problem)
    return dataclasses.replace(
        state, hook_ok=True, signature_ok=not problem, hash_ok=not problem, problem=problem
    )


def _compare(patch: Patch, known: Mapping[str, Fingerprint]) -> tuple[str, list[str]]:
    """What stands against installing the record, and the paths whose source alone has changed."""
    seen = {path: fingerprint(target) for path, target in touched(patch).items()}
    changed: list[str] = []
    for path, now in seen.items():
        expected = known.get(path)
        if expected is None:
            return f"{path} has no entry in targets.json; run {_REFRESH}", []
        if now.signature != expected.signature:
            return f"{path} takes {now.signature}, expected {expected.signature}", []
        if now.sha256 != expected.sha256:
            changed.append(path)
    if patch.kind is Kind.REPLACE:
        for path in known:
            if path.startswith(f"{patch.target}.") and path not in seen:
                return f"{path} is not in SGLang {sglang_version()} any more, or not overridden", []
    return "", changed


def _hook_problem(patch: Patch, hook: Any) -> str:
    if not callable(hook):
        return f"hook {patch.hook} of {patch.target} is not callable"
    if isinstance(hook, type) and patch.kind not in (Kind.REPLACE, Kind.REGISTRY):
        return f"hook {patch.hook} of {patch.target} is a class; {patch.kind.value} hooks are functions"
    if isinstance(hook, type) and patch.kind is Kind.REPLACE:
        stock = stock_class(hook)
        pairs = {name: (getattr(hook, name), getattr(stock, name)) for name in overrides(hook)}
        for name, (ours, theirs) in pairs.items():
            if not _accepts(ours, theirs):
                return f"{patch.hook}.{name} takes {signature_of(ours)}, SGLang's {signature_of(theirs)}"
    return ""


def _accepts(ours: Any, theirs: Any) -> bool:
    """Whether ``ours`` can be called as ``theirs`` is."""
    own = inspect.signature(inspect.unwrap(ours)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in own.values()) or signature_of(ours) == signature_of(theirs):
        return True
    # SGLang calls some unused parameters `_`, and passes them by position.
    names = list(inspect.signature(inspect.unwrap(theirs)).parameters)
    return len(own) == len(names) and all(n in (m, "_") for n, m in zip(names, own, strict=True))


def check_all(patches: Iterable[Patch], known: Mapping[str, Fingerprint] | None = None) -> None:
    """Refuse when a record cannot be installed; warn when only a target's source differs. See :func:`check_target`."""
    for patch in patches:
        state = check_target(patch, known)
        if not state.ok:
            _refuse(state.problem)
        if not state.hash_ok:
            logger.warning("elora: %s; ELORA goes on, its tests have not seen this source", state.problem)


def check_surface() -> None:
    """Refuse an SGLang that lacks, or has otherwise, what ``--elora`` uses of it; warn where only source changed."""
    for change in start.faults():
        if change.breaks:
            _refuse(
                f"SGLang {sglang_version()} does not fit: {change.line}. Run python -m elora_sglang doctor"
            )
        logger.warning("elora: %s; ELORA goes on, its tests have not seen this", change.line)


def require_in_place(patches: Iterable[Patch]) -> None:
    """Refuse when a record's hook is not what SGLang will call, naming the target and what is there instead."""
    for patch in patches:
        found = out_of_place(patch)
        if found is not None:
            instead = "" if found == patch.target else f" by {found}"
            _refuse(
                f"hook {patch.name} on {patch.target} is not in place; another plugin may have replaced "
                f"the target{instead}. Run python -m elora_sglang doctor"
            )


def require_hooks(settings: config.EloraConfig, worker: Any = None) -> None:
    """In a scheduler process: every hook is in place, and the scheduler that made ``worker`` is ELORA's.

    Called by the factory of the prefix cache, which gets no scheduler but the worker that it made.
    """
    if not settings.enabled:
        return
    require_in_place(scheduler_patches())
    if worker is not None and getattr(worker, MARK, None) is None:
        _refuse(
            f"the scheduler is {_scheduler_class()}, not EloraScheduler; remove the plugin or launcher that "
            "brings its own"
        )


def _scheduler_class() -> str:
    """The class of the scheduler that is being built above this call, for the message that refuses it."""
    stock = stock_class(pkgutil.resolve_name("sglang.srt.managers.scheduler.Scheduler"))
    frame = inspect.currentframe()
    while frame is not None:
        builder = frame.f_locals.get("self")
        if isinstance(builder, stock):
            return name_of(type(builder))
        frame = frame.f_back
    return "another"


def scheduler_patches() -> tuple[Patch, ...]:
    """The records that a scheduler process with ``--elora`` needs."""
    return select(discover(), process={Process.SCHEDULER}, when={When.ELORA})


def at_scheduler_start(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``configure_scheduler_process``: all hooks are in place before any weight is loaded."""
    require_hooks(config.current(server_args))


def _refuse(problem: str) -> NoReturn:
    raise Refused(problem)
