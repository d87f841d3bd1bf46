"""ARC (Megiddo and Modha, FAST '03) for nodes of different size: recency and frequency share the device by themselves.

T1 holds what was used once, T2 what was used again, both least recently touched first; B1 and B2 remember what left
them. A return of something in B1 raises the target size p of T1, one of B2 lowers it. T1 gives up what it
has above p, then T2 its oldest.
"""

from __future__ import annotations

from collections import OrderedDict

from elora_sglang.core.policies.base import BasePolicy
from elora_sglang.core.policies.support.ghosts import GhostKey, ghost_key
from elora_sglang.core.tree.node import Node

_CLASS = 2.0**45  # ticks stay below


class _Sized:
    """Ordered entries with sizes: the oldest first."""

    def __init__(self) -> None:
        self.entries: OrderedDict[GhostKey, int] = OrderedDict()
        self.size = 0

    def add(self, key: GhostKey, size: int) -> None:
        self.pop(key)
        self.entries[key] = size
        self.size += size

    def pop(self, key: GhostKey) -> int:
        size = self.entries.pop(key, 0)
        self.size -= size
        return size

    def shrink(self, limit: int) -> None:
        while self.size > limit:
            self.size -= self.entries.popitem(last=False)[1]


class Arc(BasePolicy):
    """Priorities in three classes: T1 above its target, then T2, then T1 within its target.

    T1 is kept as two ordered lists (over and within the target), so that a changed target moves only nodes at
    their border. ``policy_state``: "over", "within", "twice", or ``None`` off the device.
    """

    def __init__(self) -> None:
        self.on_reset()

    def on_reset(self) -> None:
        """Starts over."""
        self._over: OrderedDict[int, Node] = OrderedDict()
        self._within: OrderedDict[int, Node] = OrderedDict()
        self._within_size: int = 0
        self._over_size: int = 0
        self._twice_size: int = 0
        self._b1: _Sized = _Sized()
        self._b2: _Sized = _Sized()
        self.target: float = 0.0

    def priority(self, node: Node) -> float:
        """Class, then the tick of the last touch."""
        place = 0 if node.policy_state == "over" else 2 if node.policy_state == "within" else 1
        return place * _CLASS + node.last_tick

    def on_insert(self, node: Node) -> None:
        """Into T1, or into T2 when B1 or B2 remembers it."""
        super().on_insert(node)
        if not node.size:
            return
        key = ghost_key(node, self.view.page_size)
        ones, twos = max(self._b1.size, 1), max(self._b2.size, 1)
        if key in self._b1.entries:
            self.target += node.size * max(1.0, twos / ones)
        elif key in self._b2.entries:
            self.target -= node.size * max(1.0, ones / twos)
        self.target = min(max(self.target, 0.0), float(self.view.device_slots))
        if self._b1.pop(key) + self._b2.pop(key):
            node.policy_state = "twice"
            self._twice_size += node.size
        else:
            node.policy_state = "within"
            self._within[node.id] = node
            self._within_size += node.size
        self._balance()
        self.view.reprioritize(node)

    def on_use(self, node: Node) -> None:
        """T1 to T2."""
        if node.policy_state in ("over", "within"):
            self._out(node)
            node.policy_state = "twice"
            self._twice_size += node.size
            self._balance()
            self.view.reprioritize(node)

    def _out(self, node: Node) -> None:
        if self._over.pop(node.id, None) is not None:
            self._over_size -= node.size
        elif self._within.pop(node.id, None) is not None:
            self._within_size -= node.size
        elif node.policy_state == "twice":
            self._twice_size -= node.size

    def _balance(self) -> None:
        while self._within and self._within_size > self.target:
            _, node = self._within.popitem(last=False)
            self._within_size -= node.size
            self._over[node.id], node.policy_state = node, "over"
            self._over_size += node.size
            self.view.reprioritize(node)
        while self._over:
            node = next(reversed(self._over.values()))
            if self._within_size + node.size > self.target:
                return
            del self._over[node.id]
            self._over_size -= node.size
            self._within[node.id], node.policy_state = node, "within"
            self._within.move_to_end(node.id, last=False)
            self._within_size += node.size

    def on_split(self, upper: Node, lower: Node) -> None:
        """Both halves stay in the node's list, the upper one as its newest."""
        upper.policy_state = lower.policy_state
        if upper.policy_state == "over":
            self._over[upper.id] = upper
        elif upper.policy_state == "within":
            self._within[upper.id] = upper

    def on_evict(self, node: Node) -> None:
        """Remembered in B1 or B2."""
        ghosts = self._b2 if node.policy_state == "twice" else self._b1
        self._out(node)
        node.policy_state = None
        self.view.reprioritize(node)  # its host copy, if any
        if not node.size or node.doomed:
            return
        ghosts.add(ghost_key(node, self.view.page_size), node.size)
        slots = self.view.device_slots
        self._b1.shrink(max(slots - self._over_size - self._within_size, 0))
        self._b2.shrink(max(slots - self._twice_size, 0))
        self._balance()


def create() -> Arc:
    """A fresh ARC policy."""
    return Arc()
