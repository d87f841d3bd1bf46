"""What the tree asks of a policy, and what it tells it. Policies implement this; the tree knows none of them."""

from __future__ import annotations

from typing import Protocol

from elora_sglang.core.tree.node import Kind, Node


class Ranking(Protocol):
    """Ranks the nodes that eviction may take. Told of every event; must be a pure function of them.

    No clock, no randomness, no iteration order of sets: every tensor-parallel rank must rank alike. The tree has
    updated a node's counts before it reports the event. Priorities stay within ±1e17. Between two calls
    a priority may rise at any time; whoever lets one fall calls :meth:`DependencyTree.reprioritize`.

    Attributes:
        dependency: adapters stay while KV below them is on the device. False only in control experiments.
        exact: every fall of a priority is reported at once. False for scores that fall with time and are
            put right in slices; ``check()`` then does not compare entries with today's priorities.
    """

    dependency: bool
    exact: bool

    def priority(self, node: Node) -> float:
        """Value of keeping ``node`` on the device; the lowest leaves first, ties by node id."""
        ...

    def host_priority(self, node: Node) -> float:
        """Value of keeping the host copy of ``node``; the lowest leaves first, ties by node id."""
        ...

    def side(self, need: Kind, used_by_adapters: int) -> Kind | None:
        """Which kind of victim to take when room is needed for a node of kind ``need``; ``None``: the lowest.

        ``used_by_adapters``: device slots that adapters use now.
        """
        ...

    def on_insert(self, node: Node) -> None:
        """``node`` has device slots from now on: new KV, a loaded adapter, or anything loaded back."""
        ...

    def on_use(self, node: Node) -> None:
        """One counted use of ``node``: a request that needs it was admitted. The adapter's comes first."""
        ...

    def on_access(self, node: Node) -> None:
        """A match or an insert ended at ``node``: it and its ancestors up to the adapter were touched."""
        ...

    def on_split(self, upper: Node, lower: Node) -> None:
        """``upper`` is new and took the first tokens of ``lower``, with its counts."""
        ...

    def on_evict(self, node: Node) -> None:
        """``node`` has no device slots any more."""
        ...

    def on_drop(self, node: Node) -> None:
        """``node`` leaves the tree (it still hangs in it), or an adapter lost its last copy in memory."""
        ...

    def on_reset(self) -> None:
        """The tree was emptied."""
        ...
