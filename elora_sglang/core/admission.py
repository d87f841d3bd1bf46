"""Who enters a batch: what fits, whose adapter may be brought in, who is looked past, and who may pass whom.

A *pass* goes over the waiting queue and forms one prefill batch. For each waiting request, in queue order, whoever
drives the pass asks two or three things and does what it is told:

1. :meth:`Admission.consider`: may it be looked at now? Not if it may not pass those before it, not while what it
   needs is far from there, and not if its adapter would take the room of an earlier request's adapter.
2. :meth:`Admission.bring_in`, if its adapter is not on the device: do adapter and tokens fit together?
3. :meth:`Admission.no_tokens`, if its tokens found no room.

A request that lacks only room for its adapter, or whose copy is far from done, is *looked past*: those behind it may
enter as far as :mod:`.overtaking` lets them. Room for one whose copy is under way is set aside, so whoever passes it
costs it a prefill at most.

The server and the simulator drive the same object. It decides from the tree, from :class:`Ask` and from
:class:`Holding` alone, so a recorded pass can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from elora_sglang.core.overtaking import Overtaking
from elora_sglang.core.tree.node import Node
from elora_sglang.core.tree.tree import DependencyTree

#: Adapters that one pass may read from their files, which blocks the scheduler.
MAX_READS = 2


class Ask(NamedTuple):
    """What a waiting request would take, and what this pass has left.

    Attributes:
        rid: the request.
        adapter: key of its adapter's node; ``None``: the base model.
        need: slots that its tokens take, none of them cached: the prompt, and what it may generate.
        room: slots that the pass can still promise: free and evictable, less what it promised before.
        length: tokens that must be prefilled, none of them cached.
        left: tokens that it may still generate, one a decode batch; 0 for an aborted one.
        chunk_left: tokens that the pass can still prefill; ``None``: no bound.
        rows: rows of the batch that are still free; ``None``: no bound.
        alone: nothing runs, and nobody was admitted in this pass.
    """

    rid: str
    adapter: str | None
    need: int
    room: int
    length: int
    left: int
    chunk_left: int | None
    rows: int | None
    alone: bool


class Holding(NamedTuple):
    """What a running request gives back when it ends.

    Attributes:
        rid: the request.
        adapter: key of its adapter's node.
        own: slots of its own, and those that are promised to it.
        node: where its prefix in the tree ends.
    """

    rid: str
    adapter: str | None
    own: int
    node: Node


class Entry(NamedTuple):
    """The answer to an :class:`Ask`.

    Attributes:
        may: it may go on; else it stays in the queue.
        set_aside: slots that nobody else of this pass may be promised.
        closed: nobody behind it may enter in this pass: the scan can end.
        hopeless: nothing runs that could end, and it does not fit: it never will.
    """

    may: bool
    set_aside: int = 0
    closed: bool = False
    hopeless: bool = False


GO_ON = Entry(True)
SKIP = Entry(False)


class Admission:
    """The state of one pass, and the clocks of those that wait.

    Args:
        tree: read, never changed.
        ready: whether a waiting request may enter as far as copies in flight go.

    Attributes:
        overtaking: who may pass whom.
        blocked: the first request of this pass that found no room for its adapter.
        looked_past: whether this pass looked past a request whose copy is far from done.
        stopped: whether a request was looked past, so that those behind it are overtakers.
    """

    def __init__(self, tree: DependencyTree, ready: Callable[[str], bool]) -> None:
        self.overtaking = Overtaking()
        self.blocked: str | None = None
        self.looked_past = False
        self.stopped = False
        self._tree, self._ready = tree, ready
        self._chunk: int | None = None
        self._reads = 0
        #: Of those looked past: how many have their room set aside, so that only prefills can delay them, and how
        #: many have not.
        self._kept = self._short = 0
        #: Whether copies are worth waiting for in this pass.
        self._patient = True
        self._entered = False
        #: The request that was considered last, and the prefill and decode batches by which it could delay others.
        self._considered: tuple[str, int, int] | None = None

    # -- a pass -----------------------------------------------------------------------------------

    def begin_pass(self, running: Sequence[str], chunk: int | None) -> None:
        """A pass begins.

        Args:
            running: requests that run, those that the pass before admitted included.
            chunk: tokens that a prefill batch takes at most; ``None``: no bound.
        """
        # Nothing ran since the last pass, because it looked past all it saw: waiting in the forward is better.
        self._patient = bool(running) or not self.looked_past or self._entered
        self.blocked, self.looked_past, self.stopped = None, False, False
        self._chunk, self._reads, self._kept, self._short = chunk, 0, 0, 0
        self._entered, self._considered = False, None
        self.overtaking.begin_pass(frozenset(running))

    def consider(self, ask: Ask, holdings: Sequence[Holding] = ()) -> Entry:
        """Whether the request may be looked at now. Mutates the notes about the pass and the clocks.

        Args:
            ask: what it would take.
            holdings: of everybody who runs, where :meth:`wants_holdings` says so.
        """
        chunks, steps = self._batches(ask)
        self._considered = (ask.rid, chunks, steps)
        if self.stopped and not self.overtaking.may_pass(ask.rid, chunks=chunks, tokens=steps):
            return SKIP
        node = self._adapter(ask.adapter)
        far = self._patient and not self._ready(ask.rid)
        # In queue order, too, a third adapter to read waits for the next pass. A host copy takes nobody's time.
        if far or (self._reads >= MAX_READS and not node.resident and not node.clean):
            self.looked_past |= far
            return self._look_past(ask, node, holdings, for_copy=True)
        if self.blocked is None or node.resident:
            return GO_ON
        self.overtaking.passed_over(ask.rid)  # the room belongs to an earlier request
        return SKIP

    def bring_in(self, ask: Ask, holdings: Sequence[Holding] = ()) -> Entry:
        """Whether its adapter may be brought to the device now: adapter and tokens must fit together."""
        node = self._adapter(ask.adapter)
        if ask.need + self._unlocked_above(node) < ask.room:
            return GO_ON
        return self.no_room(ask, holdings)

    def brought_in(self, *, read: bool) -> None:
        """The adapter of the request that asked last is on the device, or on its way there.

        Args:
            read: it was read from its file.
        """
        self._reads += read

    def no_room(self, ask: Ask, holdings: Sequence[Holding] = ()) -> Entry:
        """Its adapter found no room: no other adapter is brought in before it."""
        self.blocked = ask.rid
        entry = self._look_past(ask, self._adapter(ask.adapter), holdings, for_copy=False)
        return entry._replace(hopeless=ask.alone and self._nothing_will_end())

    def no_tokens(self, ask: Ask, node: Node, cached: int, holdings: Sequence[Holding] = ()) -> Entry:
        """Its tokens found no room, though its adapter is there. The scan ends here.

        Args:
            node: where its prefix in the tree ends.
            cached: tokens up to there.
        """
        if ask.alone and self._nothing_will_end():
            return Entry(False, closed=True, hopeless=True)
        if not self.stopped:
            # Nobody passes it, but the slots of former overtakers may be what it lacks.
            need = ask.need + self._unlocked_above(node) - cached
            self.overtaking.stopped(ask.rid, fcfs_waits=self._fcfs_waits(ask, need, holdings))
        return Entry(False, closed=True)

    def wants_holdings(self, rid: str) -> bool:
        """Whether an answer about the request depends on what runs: only if it was overtaken. Changes nothing."""
        return not self.stopped and bool(self.overtaking.overtakers(rid))

    def enters(self, rid: str) -> None:
        """The request that was considered last is admitted; another one is an overtaker of nobody."""
        self._entered = True
        considered = self._considered
        chunks, steps = considered[1:] if considered is not None and considered[0] == rid else (1, 0)
        self.overtaking.admit(rid, chunks=chunks, tokens=steps, passing=self.stopped)

    # -- what fits --------------------------------------------------------------------------------

    def _adapter(self, key: str | None) -> Node:
        node = self._tree.adapter(key)
        if node is None:
            raise KeyError(f"adapter {key!r} was never registered")
        return node

    def _look_past(self, ask: Ask, adapter: Node, holdings: Sequence[Holding], *, for_copy: bool) -> Entry:
        """It waits for its adapter's room or for a copy: who may be admitted before it?"""
        need = ask.need + self._unlocked_above(adapter)
        self.overtaking.passed_over(ask.rid)
        if not self.stopped:
            waits = for_copy or self._fcfs_waits(ask, need, holdings)
            self.overtaking.stopped(ask.rid, fcfs_waits=waits, for_copy=for_copy)
        self.stopped = True
        set_aside = need if for_copy and need < ask.room else 0
        if set_aside:
            self._kept += 1
        else:
            self._short += 1
        # Ends the scan at once where not even the shortest request may pass: a thousand may wait.
        shortest = 0 if self._keeps_room(ask.rows) else 1
        closed = not self.overtaking.may_pass(None, chunks=1, tokens=shortest)
        return Entry(False, set_aside, closed)

    @staticmethod
    def _unlocked_above(node: Node) -> int:
        """Slots from ``node`` up to its adapter that no lock holds: they count as room so far."""
        size = 0
        while node.parent is not None:
            if not node.resident or node.evictable:
                size += node.size
            node = node.parent
        return size

    def _batches(self, ask: Ask) -> tuple[int, int]:
        """Prefill and decode batches by which the request could delay those that it passes."""
        chunks = 1
        if self._chunk:
            # The first chunk is what this pass has left of its own.
            chunks += -(-max(ask.length - max(ask.chunk_left or 0, 0), 0) // self._chunk)
        return chunks, 0 if self._keeps_room(ask.rows) else ask.left

    def _keeps_room(self, rows: int | None) -> bool:
        """Whether room, and a row, is set aside for all that were looked past."""
        return self._short == 0 and (rows is None or rows > self._kept)

    def _fcfs_waits(self, ask: Ask, need: int, holdings: Sequence[Holding]) -> bool:
        """Whether the request would not fit even if nobody had overtaken it."""
        return need >= ask.room + self._held_by_overtakers(ask.rid, holdings)

    def _held_by_overtakers(self, rid: str, holdings: Sequence[Holding]) -> int:
        """Slots that end with the overtakers of ``rid``: never too few; what others share is counted for them."""
        late = set(self.overtaking.overtakers(rid))
        if not late:
            return 0
        kept = {one.adapter for one in holdings if one.rid not in late}
        held, seen = 0, set()
        for one in holdings:
            if one.rid not in late:
                continue
            held += one.own
            node: Node | None = one.node
            while node is not None and node.kind != "root" and node.id not in seen:
                seen.add(node.id)
                if node.kind == "kv" or not (node.pinned or one.adapter in kept):
                    held += node.size
                node = node.parent
        return held

    def _nothing_will_end(self) -> bool:
        """Whether no lock and no copy holds anything that could be waited for: only pinned adapters are protected."""
        tree = self._tree
        pinned = sum(node.size for node in tree.adapters() if node.pinned and node.resident)
        return not tree.transfers and tree.protected_size == pinned
