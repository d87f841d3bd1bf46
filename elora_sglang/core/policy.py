"""What an eviction policy is, and how one is found by its name.

A policy is one file in :mod:`elora_sglang.core.policies`: the file's name is the policy's name, and the
file defines ``create() -> Policy``. Adding one edits no other file.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol

from elora_sglang.core import policies
from elora_sglang.core.node import Node


class Policy(Protocol):
    """Ranks the nodes that eviction may take. Told of every event; must be a pure function of them.

    No clock, no randomness, no iteration order of sets: every tensor-parallel rank must rank alike. The tree
    has updated a node's ``last_tick`` and ``visits`` before it reports the event.
    """

    def priority(self, node: Node) -> float:
        """Rank of a candidate; the lowest leaves first, ties by node id.

        May rise between two calls only through :meth:`on_access`, :meth:`on_insert` or :meth:`on_split`
        of that node. A policy that lowers it on anything else must call ``tree.reprioritize(node)``.
        """
        ...

    def on_insert(self, node: Node) -> None:
        """``node`` became resident: new KV, or an adapter whose weights were loaded."""
        ...

    def on_access(self, node: Node) -> None:
        """A match or an insert ended at ``node``: it and its ancestors up to the adapter were used."""
        ...

    def on_split(self, upper: Node, lower: Node) -> None:
        """``upper`` is new and took the first tokens of ``lower``, with its counts."""
        ...

    def on_evict(self, node: Node) -> None:
        """``node`` stopped being resident, by eviction or by an unload."""
        ...

    def on_reset(self) -> None:
        """The tree was emptied."""
        ...


class SilentPolicy:
    """Base for policies that need only some of the events: the others do nothing."""

    def on_insert(self, node: Node) -> None:
        """Nothing."""

    def on_access(self, node: Node) -> None:
        """Nothing."""

    def on_split(self, upper: Node, lower: Node) -> None:
        """Nothing."""

    def on_evict(self, node: Node) -> None:
        """Nothing."""

    def on_reset(self) -> None:
        """Nothing."""


def policy_names() -> list[str]:
    """Names of all policies, sorted: the modules of the ``policies`` package."""
    return sorted(module.name for module in pkgutil.iter_modules(policies.__path__))


def create_policy(name: str) -> Policy:
    """A fresh policy by its name; ``ValueError`` names the ones there are."""
    if name not in policy_names():
        raise ValueError(f"unknown eviction policy {name!r}; choose one of: {', '.join(policy_names())}")
    policy: Policy = importlib.import_module(f"{policies.__name__}.{name}").create()
    return policy
