"""Install patch records through SGLang's registries, see whether they took, take them back.

Everything SGLang offers is used as it is: function and class hooks go through its ``HookRegistry``, named
backends through their registering functions. SGLang's ``apply_hooks`` swallows every exception, so
:func:`in_place` looks at the target itself instead of believing the registry.
"""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import types
from collections.abc import Callable, Iterable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from elora_sglang.patches.base import Kind, Patch, rebind

_SOURCE = HookSource(plugin_name="elora", dist_name="elora-sglang")


@dataclasses.dataclass(frozen=True)
class _Installed:
    """What is needed to take a patch back: the hook, and the attribute as it was (not for registries)."""

    hook: Any
    owner: Any = None
    attribute: str = ""
    was: Any = None


_installed: dict[str, _Installed] = {}


def install(patches: Iterable[Patch]) -> None:
    """Register each record once. Function and class hooks take effect with ``HookRegistry.apply_hooks()``.

    Mutates SGLang's registries. Raises ImportError or AttributeError when a hook or a target is missing.
    """
    for patch in patches:
        if patch.name in _installed:
            continue
        hook = patch.load_hook()
        if patch.kind is Kind.REGISTRY:
            _register(patch, hook)
            _installed[patch.name] = _Installed(hook)
        else:
            owner, attribute = _owner(patch)
            was = vars(owner).get(attribute, getattr(owner, attribute))
            HookRegistry.register(patch.target, hook, HookType(patch.kind.value), source=_SOURCE)
            _installed[patch.name] = _Installed(hook, owner, attribute, was)


def _owner(patch: Patch) -> tuple[Any, str]:
    """The module or class that holds the target, and the attribute's name."""
    path, _, attribute = patch.target.rpartition(".")
    return pkgutil.resolve_name(path), attribute


def _register(patch: Patch, hook: Any) -> None:
    """Call the registering function: ``register(key, hook)`` or the decorator ``register(key)(hook)``."""
    registrar = patch.load_target()
    if len(inspect.signature(registrar).parameters) == 1:
        registrar(patch.key)(hook)
    else:
        registrar(patch.key, hook)


def in_place(patch: Patch) -> bool:
    """Whether the record's hook is what SGLang will call now. Mutates nothing."""
    installed = _installed.get(patch.name)
    if installed is None:
        return False
    if patch.kind is Kind.REGISTRY:
        assert patch.registry is not None
        entry = pkgutil.resolve_name(patch.registry).get(patch.key)
        return entry is installed.hook or (isinstance(entry, list) and installed.hook in entry)
    target = patch.load_target()
    if inspect.isclass(installed.hook):
        return target is installed.hook
    return any(hook is installed.hook for hook in _hooks_of(target))


def _hooks_of(target: Any) -> Iterable[Callable[..., Any]]:
    """Hooks that SGLang wrapped around a function, outermost first.

    Its wrappers close over a variable called ``hook`` and name what they wrap in ``__wrapped__``.
    """
    function = getattr(target, "__func__", target)
    while function is not None:
        if isinstance(function, types.FunctionType):
            cells = inspect.getclosurevars(function).nonlocals
            if "hook" in cells:
                yield cells["hook"]
        function = getattr(function, "__wrapped__", None)


def installed_names() -> frozenset[str]:
    """Names of the records that were installed in this process."""
    return frozenset(_installed)


def uninstall(patches: Iterable[Patch]) -> None:
    """Take records back: the targets are as before, in every module that had imported them by name.

    Hooks that other plugins put on the same targets after ours are re-applied by SGLang's next
    ``apply_hooks()``. Mutates SGLang's registries and modules; a record that is not installed is no error.
    """
    for patch in patches:
        installed = _installed.pop(patch.name, None)
        if installed is None:
            continue
        if patch.kind is Kind.REGISTRY:
            assert patch.registry is not None
            registry = pkgutil.resolve_name(patch.registry)
            if isinstance(registry[patch.key], list):
                registry[patch.key].remove(installed.hook)
            else:
                del registry[patch.key]
            continue
        hooks = HookRegistry._hooks[patch.target]
        hooks[:] = [entry for entry in hooks if entry[1] is not installed.hook]
        if not hooks:
            del HookRegistry._hooks[patch.target]
        HookRegistry._patched.discard(patch.target)
        patched = getattr(installed.owner, installed.attribute)
        setattr(installed.owner, installed.attribute, installed.was)
        if not inspect.isclass(installed.owner):
            # A class replaces its target by itself: where it is imported under its own name, it is meant.
            own_name = installed.hook.__name__ if patched is installed.hook else None
            rebind(patched, installed.was, keep=own_name)
