"""The control: a fixed share of the device for adapters, LRU on each side, no dependency between the two.

An adapter may leave while KV computed under it stays; that KV is invalid (it serves nobody) until the adapter is back.
"""

from __future__ import annotations

from elora_sglang.core.policies.base import BasePolicy
from elora_sglang.core.tree.node import Kind, Node


class Static(BasePolicy):
    """LRU per kind; room is taken from the side that is over its share. ``lora_share`` is settable."""

    dependency = False

    def priority(self, node: Node) -> float:
        """The tick of the last touch."""
        return node.last_tick

    def side(self, need: Kind, used_by_adapters: int) -> Kind | None:
        """Always the side that is over its share."""
        return self.fixed_side(need, used_by_adapters)


def create() -> Static:
    """A fresh control."""
    return Static()
