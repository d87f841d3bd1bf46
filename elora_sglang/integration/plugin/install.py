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

from elora_sglang.integration.plugin import counter
from elora_sglang.patches.base import Kind, Patch, overrides, rebind

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
    """Put each record in place once. Function and class hooks take effect with ``HookRegistry.apply_hooks()``.

    Mutates SGLang's registries. Raises ImportError or AttributeError when a hook or a target is missing.
    """
    for patch in patches:
        if patch.name in _installed:
            continue
        hook = counter.counted(patch)
        if patch.kind is Kind.REGISTRY:
            _register(patch, hook)
            _installed[patch.name] = _Installed(hook)
            continue
        owner, attribute = _owner(patch)
        was = vars(owner).get(attribute, getattr(owner, attribute))
        if patch.kind is Kind.ATTRIBUTE:
            hook = _replace_attribute(owner, attribute, hook)
        else:
            HookRegistry.register(patch.target, hook, HookType(patch.kind.value), source=_SOURCE)
        _installed[patch.name] = _Installed(hook, owner, attribute, was)


def _replace_attribute(owner: Any, attribute: str, hook: Callable[[Any], Any]) -> Any:
    """Set ``owner.attribute`` to what ``hook`` makes of its value, and return that."""
    value = getattr(owner, attribute)
    replacement = hook(value)
    if replacement is not value:
        replacement.__wrapped__ = value  # for fingerprints, which look through what is wrapped
        setattr(owner, attribute, staticmethod(replacement))
    return replacement


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
    return out_of_place(patch) is None


def out_of_place(patch: Patch) -> str | None:
    """What SGLang will call instead of the record's hook, as a dotted path; None when it calls the hook.

    A class counts as in place only while every member that it overrides is reached, too.
    """
    installed = _installed.get(patch.name)
    if installed is None:
        return patch.target
    if patch.kind is Kind.REGISTRY:
        assert patch.registry is not None
        entry = pkgutil.resolve_name(patch.registry).get(patch.key)
        reached = entry is installed.hook or (isinstance(entry, list) and installed.hook in entry)
        return None if reached else f"{patch.registry}[{patch.key!r}]"
    target = patch.load_target()
    if patch.kind is Kind.ATTRIBUTE:
        return None if target is installed.hook else name_of(target)
    if inspect.isclass(installed.hook):
        return _lost_override(patch, installed.hook) if target is installed.hook else name_of(target)
    return None if any(hook is installed.hook for hook in _hooks_of(target)) else patch.target


def name_of(found: Any) -> str:
    """Dotted path of a class or function, for messages."""
    return f"{getattr(found, '__module__', '?')}.{getattr(found, '__qualname__', repr(found))}"


def _lost_override(patch: Patch, ours: type) -> str | None:
    """The first overridden member that another plugin has replaced; None when all are reached.

    A plugin may wrap a member: then ours is still inside. A replacement keeps ``__wrapped__``, too, but never
    calls it, so the registry is asked.
    """
    for name in overrides(ours):
        path = f"{patch.target}.{name}"
        replaced = any(kind is HookType.REPLACE for kind, *_ in HookRegistry._hooks.get(path, ()))
        functions = _layers(getattr(ours, name))
        if replaced or not any(getattr(f, "__module__", "").startswith("elora_sglang.") for f in functions):
            return path
    return None


def _layers(function: Any) -> Iterable[Any]:
    """A function and what it wraps, outermost first; the wrappers of SGLang's registry are not listed."""
    while function is not None:
        inner = getattr(function, "__wrapped__", None)
        if inner is None or "hook" not in _nonlocals(function):
            yield function
        function = inner


def _nonlocals(function: Any) -> dict[str, Any]:
    if not isinstance(function, types.FunctionType):
        return {}
    return dict(inspect.getclosurevars(function).nonlocals)


def _hooks_of(target: Any) -> Iterable[Callable[..., Any]]:
    """Hooks that SGLang wrapped around a function, outermost first.

    Its wrappers close over a variable called ``hook`` and name what they wrap in ``__wrapped__``.
    """
    function = getattr(target, "__func__", target)
    while function is not None:
        cells = _nonlocals(function)
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
        if patch.kind is Kind.ATTRIBUTE:
            setattr(installed.owner, installed.attribute, installed.was)
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
