"""Eviction policies, one file each, found by being here; what they share is in :mod:`.base` and :mod:`.support`.

Many files, because a policy is read alone, beside the paper that it comes from, and a new one is one file more.
"""

from __future__ import annotations

import importlib
import pkgutil

from elora_sglang.core.policies.base import LORA_SHARE, Policy


def policy_names() -> list[str]:
    """Names of all policies, sorted: the modules of this package but ``base``."""
    found = pkgutil.iter_modules(__path__)
    return sorted(module.name for module in found if not module.ispkg and module.name != "base")


def create_policy(
    name: str, *, lora_share: float = LORA_SHARE, without: frozenset[str] = frozenset()
) -> Policy:
    """A fresh policy by its name, `-` for `_` allowed; ``ValueError`` names the ones there are.

    ``lora_share``: see :class:`Policy`. ``without``: only "dependency" matters here, the rest comes with the view.
    """
    file = name.replace("-", "_")
    if file not in policy_names():
        raise ValueError(f"unknown eviction policy {name!r}; choose one of: {', '.join(policy_names())}")
    policy: Policy = importlib.import_module(f"{__name__}.{file}").create()
    policy.lora_share = lora_share
    if "dependency" in without:
        policy.dependency = False
    return policy
