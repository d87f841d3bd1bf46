"""The requests that wait, in order of arrival, and what they need."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import islice

from elora_sglang.core.hints import Hints
from elora_sglang.core.tree.node import Node


@dataclass
class Waiting:
    """One waiting request.

    Attributes:
        rank: 1, 2, ... in order of arrival; also the rank of its guards.
        tokens: what it will ask the tree for.
        transfer: the copy in flight it waits for, if any.
        guarded: id of the node its guard ends at.
        end: where a walk along its tokens ended last time, at the end of that node; ``None``: not known.
        length: tokens up to there.
    """

    rid: str
    rank: int
    adapter_key: str | None
    tokens: array[int]
    namespace: Hashable
    hints: Hints | None
    transfer: int | None = None
    guarded: int | None = None
    end: Node | None = None
    length: int = 0


class WaitingQueue:
    """Waiting requests by id, oldest first, and how many wait for each adapter."""

    def __init__(self) -> None:
        self._requests: dict[str, Waiting] = {}
        self._demand: dict[str | None, int] = {}
        self._next_rank = 1

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, rid: str) -> bool:
        return rid in self._requests

    def get(self, rid: str) -> Waiting | None:
        """The waiting request ``rid``, if it waits."""
        return self._requests.get(rid)

    def first(self, count: int) -> Iterator[Waiting]:
        """The ``count`` oldest, oldest first; the queue must not change meanwhile."""
        return islice(self._requests.values(), count)

    def add(
        self, rid: str, adapter_key: str | None, tokens: array[int], namespace: Hashable, hints: Hints | None
    ) -> Waiting:
        """A request arrived (again, after a retraction). One that waits already keeps its place."""
        known = self._requests.get(rid)
        if known is not None:
            return known
        request = Waiting(rid, self._next_rank, adapter_key, tokens, namespace, hints)
        self._next_rank += 1
        self._requests[rid] = request
        self._demand[adapter_key] = self._demand.get(adapter_key, 0) + 1
        return request

    def remove(self, rid: str) -> Waiting | None:
        """It waits no more; ``None`` if it did not."""
        request = self._requests.pop(rid, None)
        if request is not None:
            left = self._demand[request.adapter_key] - 1
            if left:
                self._demand[request.adapter_key] = left
            else:
                del self._demand[request.adapter_key]
        return request

    def demand(self, adapter_key: str | None) -> int:
        """How many waiting requests need the adapter."""
        return self._demand.get(adapter_key, 0)
