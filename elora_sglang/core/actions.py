"""What the manager asks the runtime to do. Plain values: the runtime executes them in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from elora_sglang.core.tree.node import HostVictim, Kind, Node, Victim


@dataclass(frozen=True)
class Item:
    """One node of a copy: ``size`` slots; ``payload`` and ``host_payload`` name them where they are known."""

    node_id: int
    kind: Kind
    key: Any
    size: int
    payload: Any
    host_payload: Any

    @classmethod
    def of(cls, node: Node) -> Item:
        """The item of ``node`` as it is now."""
        return cls(node.id, node.kind, node.key, node.size, node.payload, node.host_payload)


@dataclass(frozen=True)
class Free:
    """Give the victims' device slots back; those with fate ``saved`` are copied out first."""

    victims: tuple[Victim, ...]


@dataclass(frozen=True)
class FreeHost:
    """Give the victims' host slots back."""

    victims: tuple[HostVictim, ...]


@dataclass(frozen=True)
class Save:
    """Copy the items to host slots; answer ``saved`` or ``failed``."""

    transfer: int
    items: tuple[Item, ...]


Why = Literal["queue", "idle", "admission"]


@dataclass(frozen=True)
class Load:
    """Copy the items to device slots, ``size`` in all; answer ``loaded`` or ``failed``.

    ``why``: ``queue`` (a waiting request ``rid`` needs it), ``idle`` (ahead of need) or ``admission``.
    """

    transfer: int
    items: tuple[Item, ...]
    size: int
    why: Why
    rid: str | None = None


@dataclass(frozen=True)
class Read:
    """Read adapter ``key`` from its file into ``size`` host slots; answer ``saved`` or ``failed``."""

    transfer: int
    key: str
    size: int


Action = Free | FreeHost | Save | Load | Read
