"""What an eviction policy is, and how one is found by its name.

A policy is one file in :mod:`elora_sglang.core.policies`: the file's name is the policy's name, and the
file defines ``create() -> Policy``. Adding one edits no other file.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol

from elora_sglang.core import policies
from elora_sglang.core.node import Kind, Node


class Policy(Protocol):
    """Ranks the nodes that may leave a tier. Told of every event; must be a pure function of them.

    No clock, no randomness, no iteration order of sets: every tensor-parallel rank must rank alike. The tree
    has updated a node's ``last_tick``, ``last_use`` and ``visits`` before it reports the event.
    """

    #: False only for a control that lets an adapter leave the device while its KV stays.
    dependency: bool

    def priority(self, node: Node) -> float:
        """Value of keeping ``node`` on the device; the lowest leaves first, ties by node id.

        May rise between two calls only through an event of that node. A policy that lowers it on anything
        else must call ``tree.reprioritize(node)``. Stays far below ``1e17``.
        """
        ...

    def host_priority(self, node: Node) -> float:
        """Value of keeping the host copy of ``node``; rules as for :meth:`priority`."""
        ...

    def side(self, need: Kind, used_by_adapters: int) -> Kind | None:
        """Which kind must give way first to make room for ``need``; ``None``: whatever has the lowest value.

        ``used_by_adapters``: device slots of resident adapters.
        """
        ...

    def on_insert(self, node: Node) -> None:
        """``node`` became resident: new KV, or something that was loaded."""
        ...

    def on_use(self, node: Node) -> None:
        """One counted use of ``node``; reported for every node of the path, the adapter first."""
        ...

    def on_access(self, node: Node) -> None:
        """A match or an insert ended at ``node``: it and its ancestors up to the adapter were touched."""
        ...

    def on_split(self, upper: Node, lower: Node) -> None:
        """``upper`` is new and took the first tokens of ``lower``, with its counts."""
        ...

    def on_evict(self, node: Node) -> None:
        """``node`` stopped being resident, by eviction or by an unload."""
        ...

    def on_drop(self, node: Node) -> None:
        """No copy of ``node`` is left in memory: KV leaves the tree, an adapter has only its file."""
        ...

    def on_reset(self) -> None:
        """The tree was emptied."""
        ...


class BasePolicy:
    """One unified order and no state: what a policy does unless it says otherwise. Lacks only ``priority``."""

    dependency = True

    def priority(self, node: Node) -> float:
        """Value of keeping ``node`` on the device."""
        raise NotImplementedError

    def host_priority(self, node: Node) -> float:
        """As on the device."""
        return self.priority(node)

    def side(self, need: Kind, used_by_adapters: int) -> Kind | None:
        """No side: adapters and KV in one order."""
        return None

    def on_insert(self, node: Node) -> None:
        """Nothing."""

    def on_use(self, node: Node) -> None:
        """Nothing."""

    def on_access(self, node: Node) -> None:
        """Nothing."""

    def on_split(self, upper: Node, lower: Node) -> None:
        """Nothing."""

    def on_evict(self, node: Node) -> None:
        """Nothing."""

    def on_drop(self, node: Node) -> None:
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
