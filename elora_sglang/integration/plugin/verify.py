"""Fail closed: with ``--elora`` every hook is in place, or the server does not start.

SGLang's plugin loader logs a failing hook and serves on without it, which would be stock behaviour under
ELORA's name. So the targets are checked before the hooks are installed, and the hooks after SGLang
applied them: in the launcher, at the start of every scheduler process, and again when the scheduler
builds its prefix cache.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from importlib import metadata
from typing import Any, NoReturn

from packaging.specifiers import SpecifierSet

from elora_sglang.integration.plugin import config
from elora_sglang.integration.plugin.install import in_place
from elora_sglang.patches.base import (
    Kind,
    Patch,
    Process,
    When,
    discover,
    fingerprint,
    manifest,
    select,
    signature_of,
)
from elora_sglang.patches.surface import start

logger = logging.getLogger(__name__)


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


def check_target(patch: Patch) -> TargetState:
    """Compare a record with the installed SGLang. Imports the target's module; changes nothing."""
    version = sglang_version()
    state = TargetState(patch, version_ok=version_allowed(patch.sglang, version))
    if not state.version_ok:
        return dataclasses.replace(
            state,
            problem=f"patch {patch.name} of {patch.target} was written for SGLang {patch.sglang}, "
            f"installed is {version}; install a supported SGLang or a newer elora-sglang",
        )
    try:
        target = patch.load_target()
        if patch.registry:
            Patch.load_target(dataclasses.replace(patch, target=patch.registry))
    except (ImportError, AttributeError) as error:
        return dataclasses.replace(state, problem=f"{patch.target} is not in SGLang {version}: {error}")
    expected = manifest().get(patch.target)
    if expected is None:
        return dataclasses.replace(
            state,
            found=True,
            problem=f"{patch.target} has no entry in patches/targets.json; "
            "run python -m elora_sglang.patches.table --refresh",
        )
    seen = expected if _is_our_class(target) else fingerprint(target)
    state = dataclasses.replace(
        state,
        found=True,
        signature_ok=seen.signature == expected.signature,
        hash_ok=seen.sha256 == expected.sha256,
    )
    if not state.signature_ok:
        return dataclasses.replace(
            state, problem=f"{patch.target} takes {seen.signature}, expected {expected.signature}"
        )
    try:
        problem = _hook_problem(patch, patch.load_hook())
    except Exception as error:
        problem = f"hook {patch.hook} of {patch.target} cannot be imported: {error}"
    if problem:
        return dataclasses.replace(state, problem=problem)
    return dataclasses.replace(
        state,
        hook_ok=True,
        problem="" if state.hash_ok else f"source of {patch.target} differs from the one that was read",
    )


def _is_our_class(target: Any) -> bool:
    """Whether a class target has been replaced already; the original can then no longer be seen."""
    return isinstance(target, type) and target.__module__.startswith("elora_sglang.")


def _hook_problem(patch: Patch, hook: Any) -> str:
    if not callable(hook):
        return f"hook {patch.hook} of {patch.target} is not callable"
    if isinstance(hook, type) and patch.kind not in (Kind.REPLACE, Kind.REGISTRY):
        return f"hook {patch.hook} of {patch.target} is a class; {patch.kind.value} hooks are functions"
    if isinstance(hook, type) and patch.kind is Kind.REPLACE:
        target = patch.load_target()
        if isinstance(target, type) and not _accepts(signature_of(hook), signature_of(target)):
            return f"{patch.hook} takes {signature_of(hook)}, {patch.target} {signature_of(target)}"
    return ""


def _accepts(ours: str, theirs: str) -> bool:
    return ours == theirs or "**" in ours


def check_all(patches: Iterable[Patch]) -> None:
    """Refuse when a record cannot be installed; warn when only a target's source differs."""
    for patch in patches:
        state = check_target(patch)
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
    """Refuse when a record's hook is not what SGLang will call, naming the target."""
    for patch in patches:
        if not in_place(patch):
            _refuse(
                f"hook {patch.name} on {patch.target} is not in place; another plugin may have replaced "
                "the target. Run python -m elora_sglang doctor"
            )


def require_hooks(settings: config.EloraConfig) -> None:
    """In a scheduler process: every hook is in place. Called by the factory of the prefix cache."""
    if settings.enabled:
        require_in_place(scheduler_patches())


def scheduler_patches() -> tuple[Patch, ...]:
    """The records that a scheduler process with ``--elora`` needs."""
    return select(discover(), process={Process.SCHEDULER}, when={When.ELORA})


def at_scheduler_start(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE ``configure_scheduler_process``: all hooks are in place before any weight is loaded."""
    require_hooks(config.current(server_args))


def _refuse(problem: str) -> NoReturn:
    raise Refused(problem)
