"""Replays what SGLang's own prefix cache was asked on the simulator's tree, and compares every answer.

The lines come from :mod:`elora_sglang.eval.baselines.record`. Matches, insertions, locks, amounts evicted, backups and
load-backs are the recorded events; what is found and who is evicted is decided here. So equal answers mean that the
tree and its LRU order are those of stock SGLang, and of HiCache, on this traffic.
"""

from __future__ import annotations

import base64
import itertools
import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from elora_sglang.core.policies.base import BasePolicy
from elora_sglang.core.tree.node import Node
from elora_sglang.core.tree.tree import DependencyTree
from elora_sglang.eval.sim.unified import SlotCounts

#: What the device has leaves the host after everything that it has not, as in HiCache.
_RESIDENT = 1e15


class SglangLru(BasePolicy):
    """Least recently used, as SGLang's tree has it: what is left of a node that is split counts as used just then."""

    def __init__(self) -> None:
        self._time = 0

    def priority(self, node: Node) -> float:
        """Time of the last use."""
        return float(node.policy_state or 0)

    def host_priority(self, node: Node) -> float:
        """The same, but what is on the device as well stays."""
        return self.priority(node) + (_RESIDENT if node.resident else 0.0)

    def on_access(self, node: Node) -> None:
        """The path was touched."""
        self._time += 1
        while node.kind == "kv":
            node.policy_state = self._time
            assert node.parent is not None
            node = node.parent

    def on_split(self, upper: Node, lower: Node) -> None:
        """Both are new to the order."""
        self._time += 1
        upper.policy_state = lower.policy_state = self._time

    def on_evict(self, node: Node) -> None:
        """On the host alone it may leave sooner."""
        self.view.reprioritize(node)


@dataclass
class Replayed:
    """Figures of a replay, as they grow.

    Attributes:
        events: lines replayed.
        matches: matches among them.
        recorded, replayed: tokens found by all matches, on the device and on the host.
        evicted: tokens that left the device, and the host.
        difference: the first one in words, or None.
    """

    events: int = 0
    matches: int = 0
    recorded: list[int] = field(default_factory=lambda: [0, 0])
    replayed: list[int] = field(default_factory=lambda: [0, 0])
    evicted: list[int] = field(default_factory=lambda: [0, 0])
    difference: str | None = None


class _View:
    """What the policy needs of a view: entries that follow."""

    def __init__(self, tree: DependencyTree) -> None:
        self._tree = tree

    def reprioritize(self, node: Node) -> None:
        self._tree.reprioritize(node)

    switched_off: frozenset[str] = frozenset()


class _Replay:
    def __init__(self, events: list[list[Any]]) -> None:
        self._events, self.found = events, Replayed()
        self._policy = SglangLru()
        self.tree = DependencyTree(1, self._policy, SlotCounts())
        self._policy.view = _View(self.tree)  # type: ignore[assignment]  # it asks for nothing else
        self._nodes: dict[int, Node] = {}
        self._inserted: tuple[Node, int] | None = None
        #: Locks of nodes whose names come with their backup.
        self._early: list[int] = []
        #: The node whose load-back is being tried, and whether it came back; locks of it so far.
        self._loading: tuple[int, bool] | None = None
        self._tries = 0

    def _adapter(self, key: str | None) -> Node:
        if key is None:
            return self.tree.base
        known = self.tree.adapter(key)
        if known is not None:
            return known
        node = self.tree.register_adapter(key, 0, pinned=True)
        self.tree.make_resident(node, 0)
        self.tree.place_on_host(node, 0)
        return node

    def play(self) -> Replayed:
        """All events up to the first difference."""
        for event, *args in self._events:
            self.found.events += 1
            difference: str | None = getattr(self, f"_on_{event}")(*args)
            if difference is not None:
                self.found.difference = f"event {self.found.events} ({event}): {difference}"
                break
        return self.found

    def _ahead(self, event: str) -> list[Any]:
        """The next event of this name."""
        return next(one for one in itertools.islice(self._events, self.found.events, None) if one[0] == event)

    def _on_match(
        self, key: str | None, tokens: str, device: int, node: int | None, host: int, deepest: int | None
    ) -> str | None:  # fmt: skip
        match = self.tree.match(self._adapter(key), _decode(tokens))
        self.found.matches += 1
        for number, (theirs, ours) in enumerate(((device, match.length), (host, match.host_length))):
            self.found.recorded[number] += theirs
            self.found.replayed[number] += ours
        self._know(node, match.node)
        self._know(deepest, match.host_node)
        if (device, host) != (match.length, match.host_length):
            return f"found {match.length} + {match.host_length} tokens, recorded {device} + {host}"
        return None

    def _know(self, id: int | None, node: Node) -> None:
        if id is not None:
            self._nodes[id] = node

    def _on_insert(self, key: str | None, tokens: str) -> None:
        blocks = _decode(tokens)
        adapter = self._adapter(key)
        _, there = self.tree.find(adapter, blocks)
        inserted = self.tree.insert(adapter, blocks, None, len(blocks), len(blocks))
        # SGLang names the node only when the insertion is over; backups of it come before.
        self._inserted = inserted.node, there
        self._know(self._ahead("inserted")[2], inserted.node)

    def _on_inserted(self, prefix: int, node: int | None) -> str | None:
        assert self._inserted is not None
        found, there = self._inserted
        self._know(node, found)
        return None if there == prefix else f"{there} tokens were there, recorded {prefix}"

    def _on_lock(self, node: int | None) -> None:
        if node is None:
            return
        if self._loading is not None and self._loading[0] == node:
            self._tries += 1
            if self._tries == 2 and self._loading[1]:
                self._bring_back(self._nodes[node])
        if node in self._nodes:
            self.tree.lock(self._nodes[node])
        else:
            self._early.append(node)

    def _on_unlock(self, node: int | None) -> None:
        if node is not None:
            self.tree.unlock(self._nodes[node])

    def _on_evict(self, tokens: int) -> str | None:
        freed = sum(victim.size for victim in self.tree.evict(tokens))
        self.found.evicted[0] += freed
        return None if freed == tokens else f"{freed} tokens left the device, recorded {tokens}"

    def _on_evict_host(self, tokens: int) -> str | None:
        freed = sum(victim.size for victim in self.tree.evict_host(tokens))
        self.found.evicted[1] += freed
        return None if freed == tokens else f"{freed} tokens left the host, recorded {tokens}"

    def _on_backup(self, node: int, end: int) -> None:
        assert self._inserted is not None
        place: Node = self._inserted[0]
        # Nodes that came of splits have names that were never told; they lie on the way to the node inserted.
        path = self.tree.path(place)
        place = next(one for one in path if _end(self.tree, one) == end)
        self._know(node, place)
        while node in self._early:
            self._early.remove(node)
            self.tree.lock(place)
        transfer = self.tree.begin_save(place)
        for one in transfer.nodes:
            self.tree.set_host_payload(one, one.size)
        self.tree.end_transfer(transfer.id)

    def _on_load(self, node: int) -> None:
        self._loading, self._tries = (node, bool(self._ahead("loaded")[1])), 0

    def _on_loaded(self, came: bool) -> None:
        self._loading = None

    def _bring_back(self, node: Node) -> None:
        transfer = self.tree.begin_load(node)
        for one in transfer.nodes:
            self.tree.set_payload(one, one.size)
        self.tree.end_transfer(transfer.id)

    def _on_reset(self) -> None:
        self.tree.reset()
        self._nodes.clear()


def _end(tree: DependencyTree, node: Node) -> int:
    return sum(one.size for one in tree.path(node))


def _decode(tokens: str) -> array[int]:
    found = array("i")
    found.frombytes(base64.b64decode(tokens))
    return array("q", found)


def replay(lines: Iterable[str]) -> Replayed:
    """Play recorded lines until the first difference. Raises ValueError where they are no record."""
    try:
        events = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"not a record of a cache: {error}") from None
    return _Replay(events).play()
