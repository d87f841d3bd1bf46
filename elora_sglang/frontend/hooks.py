"""Put the records of ``patches/frontend.py`` in place in a client process, and take them back.

Server processes use SGLang's own hook registry; a client applies only what is its own, at the moment of the
import, and refuses an SGLang that the records were not written for.
"""

from __future__ import annotations

import functools
import inspect
import pkgutil
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet

from elora_sglang.patches.base import Patch, manifest, rebind, signature_of
from elora_sglang.patches.frontend import PATCHES

# What was there before, in the order of installation: owner, attribute, original, replacement.
_installed: list[tuple[Any, str, Any, Any]] = []


def install() -> None:
    """Put all hooks in place; does nothing when they are.

    Mutates SGLang's modules and classes, and modules that have imported one of the functions by name.

    Raises:
        ImportError: one line that names what does not fit; nothing was changed.
    """
    if _installed:
        return
    for patch in PATCHES:
        _require_fit(patch)
    for patch in PATCHES:
        path, _, attribute = patch.target.rpartition(".")
        owner = pkgutil.resolve_name(path)
        original = getattr(owner, attribute)
        replacement = _around(original, patch.load_hook())
        _put(owner, attribute, original, replacement)
        _installed.append((owner, attribute, original, replacement))


def uninstall() -> None:
    """Take all hooks back: SGLang is as it was before the import. Without hooks, does nothing."""
    while _installed:
        owner, attribute, original, replacement = _installed.pop()
        _put(owner, attribute, replacement, original)


def is_installed() -> bool:
    """Whether ``lora_path`` is understood in this process."""
    return bool(_installed)


def _put(owner: Any, attribute: str, old: Any, new: Any) -> None:
    setattr(owner, attribute, new)
    if not inspect.isclass(owner):
        rebind(old, new)


def _require_fit(patch: Patch) -> None:
    version = metadata.version("sglang")
    where = f"elora_sglang.frontend: {patch.target}"
    if not SpecifierSet(patch.sglang).contains(version, prereleases=True):
        raise ImportError(
            f"{where} was written for SGLang {patch.sglang}, installed is {version}; "
            "install a supported SGLang or a newer elora-sglang"
        )
    try:
        seen = signature_of(patch.load_target())
    except (ImportError, AttributeError) as error:
        raise ImportError(f"{where} is not in SGLang {version}: {error}") from error
    expected = manifest()[patch.target].signature
    if seen != expected:
        raise ImportError(
            f"{where} takes {seen}, expected {expected}; reinstall sglang=={version} or report this"
        )


def _around(original: Any, hook: Any) -> Any:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    signature = inspect.signature(original)
    added = inspect.signature(hook).parameters.get("lora_path")
    if added is not None:  # shown by help()
        parameters = [*signature.parameters.values()]
        at = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
        parameters.insert(at, added)
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call
