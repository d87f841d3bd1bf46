"""What is remembered of nodes that left memory: their use counts, in a bounded list."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import NamedTuple

from elora_sglang.core.tree.node import Node

GhostKey = tuple[str | None, bytes]

#: Entries kept; the oldest goes first. About 200 bytes each.
CAPACITY = 65_536


class Ghost(NamedTuple):
    """Decayed number of uses; when the last one was, on the reuse clock and in seconds."""

    weight: float
    last_use: float
    at: float


def ghost_key(node: Node, page_size: int) -> GhostKey:
    """The adapter's key and 8 bytes of a blake2b of the token path down to the node's *first* page.

    The first page, not the last: the same text may come back in one node that is longer than before, and starts
    where the lost one started. O(tokens of the path); called only when a node enters or leaves memory.
    """
    adapter = node.adapter
    key = None if adapter is None else adapter.key
    if node.kind != "kv":
        return key, b""
    path: list[Node] = []
    above = node
    while above.parent is not None and above.kind == "kv":
        path.append(above)
        above = above.parent
    digest = hashlib.blake2b(digest_size=8)
    first = path[-1].key
    if isinstance(first, tuple):
        digest.update(repr(first[0]).encode())
    for one in reversed(path[1:]):
        digest.update(one.tokens)
    digest.update(node.tokens[:page_size])
    return key, digest.digest()


class GhostList:
    """Remembers the last ``capacity`` nodes that left memory. O(1) an operation."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        if capacity < 1:
            raise ValueError(f"a ghost list needs room for at least one entry, got {capacity}")
        self._capacity = capacity
        self._ghosts: OrderedDict[GhostKey, Ghost] = OrderedDict()

    def __len__(self) -> int:
        """Number of entries."""
        return len(self._ghosts)

    def remember(self, key: GhostKey, ghost: Ghost) -> None:
        """Keep ``ghost`` as the newest entry, in place of an older one of the same key."""
        self._ghosts[key] = ghost
        self._ghosts.move_to_end(key)
        if len(self._ghosts) > self._capacity:
            self._ghosts.popitem(last=False)

    def recall(self, key: GhostKey) -> Ghost | None:
        """Remove and return the entry of ``key``, if there is one."""
        return self._ghosts.pop(key, None)

    def clear(self) -> None:
        """Forget all."""
        self._ghosts.clear()
