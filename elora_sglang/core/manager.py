"""The cache manager: events in, actions out.

The one object that decides in the server, on replay and in the simulator. Every method that is an *event*
(:data:`EVENTS`) is called in the same order with the same values on every tensor-parallel rank. Nothing else reaches
a decision: no clock (time comes with :meth:`CacheManager.tick`), no randomness, no order of sets.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from elora_sglang.core.actions import Action, Free, FreeHost, Item, Load, Read, Save
from elora_sglang.core.admission import Admission, Ask, Entry, Holding
from elora_sglang.core.costs import Costs
from elora_sglang.core.hints import Hints
from elora_sglang.core.policies import create_policy
from elora_sglang.core.policies.base import Policy
from elora_sglang.core.swapper import Swapper, SwapSettings
from elora_sglang.core.tree.node import Insert, Kind, Match, Node
from elora_sglang.core.tree.payloads import PayloadOps
from elora_sglang.core.tree.tree import DependencyTree
from elora_sglang.core.waiting import WaitingQueue

__all__ = [
    "EVENTS",
    "Action",
    "CacheManager",
    "Free",
    "FreeHost",
    "Item",
    "Load",
    "Read",
    "Save",
    "SwapSettings",
]

#: Methods that change anything; what they are called with is all that decisions depend on.
EVENTS = (
    "tick",
    "enqueue",
    "enqueue_lost",
    "most_new_tokens",
    "begin_pass",
    "consider",
    "bring_in",
    "brought_in",
    "no_room",
    "no_tokens",
    "batch",
    "started",
    "finished",
    "forget",
    "register",
    "unregister",
    "set_pinned",
    "place_on_host",
    "make_resident",
    "match",
    "insert",
    "split_at",
    "lock",
    "unlock",
    "collect",
    "evict",
    "load_for",
    "loaded",
    "saved",
    "failed",
    "reset",
)

#: The paper's BS is a mean over this many seconds (Eq. 3).
BATCH_WINDOW_S = 5.0
#: By how much the measured decode step may change from one iteration to the next.
STEP_FALLS, STEP_RISES = 0.5, 1.05
#: Iterations after an admission that may hold its prefill: with SGLang's overlap schedule the one that admits waits for
#: the batch before.
PREFILL_TICKS = 2


class CacheManager:
    """Tree, policy, waiting queue, admission and swapper of one pool.

    Args:
        page_size: tokens per page.
        device_slots: size of the device pool.
        policy_name: a policy of :mod:`elora_sglang.core.policies`.
        payloads: splits and slices what the runtime keeps per node.
        settings: of the swapper; ``host_slots`` 0 means that nothing is ever copied.
        costs: what moving and computing costs, until a tick brings better figures.
        policy: taken instead of one made by name; for studies, as no recording of it can be replayed.

    Attributes:
        tree: to be read; changed through events only.
        admission: who enters a batch; to be read.
        now: seconds, as of the last tick.
        batch_size: mean number of running and waiting requests over the last 5 s.
        step_s: seconds of a decode step, as the times of the ticks show; 0 before anything ran.
    """

    def __init__(
        self,
        page_size: int,
        device_slots: int,
        policy_name: str,
        payloads: PayloadOps,
        settings: SwapSettings,
        costs: Costs,
        policy: Policy | None = None,
    ) -> None:
        self.page_size = page_size
        self.device_slots = device_slots
        self.host_slots = settings.host_slots
        self.policy_name = policy_name
        self.settings = settings
        self.switched_off = settings.switched_off
        self.costs = costs
        self.now = 0.0
        self.batch_size = 0.0
        self.policy = policy or create_policy(
            policy_name, lora_share=settings.lora_share, switched_off=settings.switched_off
        )
        self.waiting = WaitingQueue()
        self.policy.bind(self)
        self.tree = DependencyTree(page_size, self.policy, payloads)
        self.admission = Admission(self.tree, lambda rid: self.ready(rid))
        self.swapper = Swapper(self.tree, self.waiting, settings, device_slots, costs)
        self._load_sizes: deque[tuple[float, int]] = deque()
        self._load_sum = 0
        self._running = 0
        self._next_plan = 0.0
        self._queue_changed = False
        self._unmeasured = 0
        self.step_s = 0.0

    # -- what a policy sees -----------------------------------------------------------------------

    def waiting_for(self, adapter_key: str | None) -> int:
        """How many waiting requests need the adapter."""
        return self.waiting.demand(adapter_key)

    def resident_adapters(self) -> int:
        """How many adapters have device slots, the base model not counted."""
        return self.tree.root.resident_children - 1

    def reprioritize(self, node: Node) -> None:
        """A priority of ``node`` fell without an event of it."""
        self.tree.reprioritize(node)

    # -- time and requests ------------------------------------------------------------------------

    def tick(
        self,
        now: float,
        free: int,
        finished: Sequence[tuple[int, bool]] = (),
        costs: Costs | None = None,
        running: int = 0,
    ) -> list[Action]:
        """Once per scheduler iteration: book what finished, and plan when it is time to.

        Args:
            now: seconds on any clock that never goes back.
            free: device slots that the allocator could give now.
            finished: transfers that ended since the last tick, with their outcome.
            costs: refined ones, if there are any.
            running: requests that run.
        """
        self._measure_step(now - self.now)
        self.now = self.tree.now = self.swapper.now = max(now, self.now)
        if costs is not None:
            self.costs = self.swapper.costs = costs
        self._running = running
        self._measure_batch(running + len(self.waiting))
        self.policy.on_tick()
        actions: list[Action] = []
        for transfer, ok in finished:
            actions += self.swapper.ended(transfer, ok)
        if self._queue_changed or finished or self.now >= self._next_plan:
            gained = sum(
                v.size for a in actions if isinstance(a, Free) for v in a.victims if v.payload is not None
            )
            self._queue_changed = False
            self._next_plan = self.now + self.settings.swap_interval_s
            actions += self.swapper.plan(free + gained)
        return actions

    def _measure_step(self, elapsed: float) -> None:
        """Follow the shortest iterations: what is longer did more than decode, or waited for something."""
        if self._unmeasured:
            self._unmeasured -= 1
        elif self._running and elapsed > 0.0:
            before = self.step_s or elapsed
            self.step_s = min(max(elapsed, STEP_FALLS * before), STEP_RISES * before)

    def _measure_batch(self, size: int) -> None:
        sizes = self._load_sizes
        sizes.append((self.now, size))
        self._load_sum += size
        while sizes[0][0] < self.now - BATCH_WINDOW_S:
            self._load_sum -= sizes.popleft()[1]
        self.batch_size = self._load_sum / len(sizes)

    def enqueue(
        self,
        rid: str,
        adapter_key: str | None,
        tokens: array[int],
        namespace: Hashable = None,
        hints: Hints | None = None,
    ) -> None:
        """Request ``rid`` waits from now on; what it needs may start moving at the next tick."""
        adapter = self.tree.adapter(adapter_key)
        self.admission.overtaking.queue(rid, for_adapter=adapter is None or not adapter.resident)
        self.waiting.add(rid, adapter_key, tokens, namespace, hints)
        self._queue_changed = True

    def enqueue_lost(self, rid: str) -> None:
        """It waits only to be turned away: it takes its place in the queue, and needs nothing."""
        self.admission.overtaking.queue(rid, for_adapter=False)

    # -- admission --------------------------------------------------------------------------------

    def most_new_tokens(self, prompt: int, adapter: int, pinned: int) -> int:
        """How many tokens a request may generate so that it can ever be admitted; negative: not even its prompt fits.

        Args:
            prompt: tokens of its prompt.
            adapter: slots of its adapter.
            pinned: slots of all other pinned adapters, which nobody can evict.
        """
        pages = -(-prompt // self.page_size) * self.page_size
        return self.device_slots - adapter - pinned - pages - self.page_size - 1

    def begin_pass(self, running: Sequence[str], chunk: int | None = None) -> None:
        """See :meth:`Admission.begin_pass`."""
        self.admission.begin_pass(running, chunk)

    def consider(self, ask: Ask, holdings: Sequence[Holding] = ()) -> Entry:
        """See :meth:`Admission.consider`."""
        return self.admission.consider(ask, holdings)

    def bring_in(self, ask: Ask, holdings: Sequence[Holding] = ()) -> Entry:
        """See :meth:`Admission.bring_in`."""
        return self.admission.bring_in(ask, holdings)

    def brought_in(self, read: bool) -> None:
        """See :meth:`Admission.brought_in`."""
        self.admission.brought_in(read=read)

    def no_room(self, ask: Ask, holdings: Sequence[Holding] = ()) -> Entry:
        """See :meth:`Admission.no_room`."""
        return self.admission.no_room(ask, holdings)

    def no_tokens(self, ask: Ask, node: Node, cached: int, holdings: Sequence[Holding] = ()) -> Entry:
        """See :meth:`Admission.no_tokens`."""
        return self.admission.no_tokens(ask, node, cached, holdings)

    def started(self, rid: str, node: Node) -> None:
        """The request was admitted with the prefix that ends at ``node``: one counted use, and its guards go."""
        self._unmeasured = PREFILL_TICKS
        self.admission.enters(rid)
        self._leave_queue(rid)
        self.tree.count_use(node)
        self.swapper.offer_path(node)

    def batch(self, prefilled: Sequence[str], decodes: bool) -> None:
        """A batch is about to run: the queue's logical time, which counts batches, goes on.

        Args:
            prefilled: all its requests where it prefills any; else none.
            decodes: whether it decodes, alone or beside prompts.
        """
        self.admission.overtaking.batch(prefilled, prefill=bool(prefilled), decode=decodes)

    def finished(self, rid: str, node: Node, hints: Hints | None = None) -> None:
        """The request ended; ``node`` is the last node of its prompt and answer."""
        self._leave_queue(rid)
        self.policy.on_finish(node, hints or Hints())

    def forget(self, rid: str) -> None:
        """The request was aborted while it waited. Nothing happens if it did not wait."""
        self._leave_queue(rid)

    def _leave_queue(self, rid: str) -> None:
        self.admission.overtaking.leave(rid)
        request = self.waiting.remove(rid)
        if request is not None:
            self.tree.unguard(request.rank)
            self._queue_changed = True

    def ready(self, rid: str) -> bool:
        """Whether it may be admitted now, as far as copies go; False: other work should run first.

        It may when nothing it needs is in flight, when nothing runs that could use the time, or when what is
        left of its load is no longer than the prefill that hides it, layer by layer, and a decode step more:
        whoever is passed over waits for a whole step, which costs more than running requests lose by a shorter
        wait. Changes nothing.
        """
        request = self.waiting.get(rid)
        if request is None or request.transfer not in self.tree.transfers or not self._running:
            return True
        assert request.transfer is not None
        transfer = self.tree.transfers[request.transfer]
        if transfer.kind == "read":
            return self.swapper.read_failed(request.adapter_key)
        loaded = sum(node.size for node in transfer.nodes if node.kind == "kv")
        new = max(len(request.tokens) - loaded, 1)
        return self.swapper.remaining_s(transfer.id) <= self.costs.recompute_s(loaded, new) + self.step_s

    # -- adapters ---------------------------------------------------------------------------------

    def register(self, key: str, size: int, pinned: bool = False) -> Node:
        """The node of adapter ``key``; see :meth:`DependencyTree.register_adapter`."""
        return self.tree.register_adapter(key, size, pinned=pinned)

    def unregister(self, key: str) -> list[Action]:
        """Unload: the branch leaves both tiers, what is in use when its last lock or copy ends."""
        node = self.tree.adapter(key)
        if node is None or node is self.tree.base:
            return []
        dropped = self.tree.drop_branch(node)
        return self.swapper.freed(dropped.victims, dropped.host_victims)

    def set_pinned(self, key: str, pinned: bool) -> None:
        """Pin or unpin a registered adapter."""
        node = self.tree.adapter(key)
        if node is not None:
            self.tree.set_pinned(node, pinned)

    def place_on_host(self, node: Node, payload: Any) -> None:
        """The runtime wrote the adapter into host slots of its own accord."""
        self.tree.place_on_host(node, payload)
        self._offer_below(node)

    def make_resident(self, node: Node, payload: Any) -> None:
        """The runtime wrote the adapter into device slots from its file."""
        self.tree.make_resident(node, payload)
        self._offer_below(node)

    def _offer_below(self, node: Node) -> None:
        self.swapper.offer(node)
        for child in node.children.values():
            self.swapper.offer(child)

    # -- the tree's calls -------------------------------------------------------------------------

    def match(
        self, adapter: Node, tokens: array[int], namespace: Hashable = None, limit: int | None = None
    ) -> Match:
        """See :meth:`DependencyTree.match`."""
        return self.tree.match(adapter, tokens, namespace, limit)

    def insert(
        self,
        adapter: Node,
        tokens: array[int],
        namespace: Hashable,
        payload: Any,
        length: int | None = None,
    ) -> Insert:
        """See :meth:`DependencyTree.insert`; what is new may be backed up from now on."""
        inserted = self.tree.insert(adapter, tokens, namespace, payload, length)
        self.swapper.offer_path(inserted.node)
        return inserted

    def split_at(self, adapter: Node, tokens: array[int], namespace: Hashable, at: int) -> Node:
        """See :meth:`DependencyTree.split_at`."""
        node = self.tree.split_at(adapter, tokens, namespace, at)
        self.swapper.offer_path(node)
        return node

    def lock(self, node: Node) -> None:
        """See :meth:`DependencyTree.lock`."""
        self.tree.lock(node)

    def unlock(self, node: Node) -> None:
        """See :meth:`DependencyTree.unlock`; what a doomed branch frees comes with :meth:`collect`."""
        self.tree.unlock(node)

    def collect(self) -> list[Action]:
        """What doomed branches gave up since the last call."""
        return self.swapper.freed(self.tree.collect_doomed(), self.tree.collect_doomed_host())

    def evict(self, need: int, kind: Kind = "kv") -> list[Action]:
        """Free at least ``need`` device slots if unlocked nodes allow it; guarded ones go last."""
        return self.swapper.evict(need, kind)[1]

    # -- copies -----------------------------------------------------------------------------------

    def load_for(self, node: Node) -> Load | None:
        """Bring back all that is missing on the way to ``node``, now, for a request that is being admitted.

        ``None`` when it is not all complete on the host. The runtime makes room, then answers as for any load.
        """
        missing = self.tree.missing(node)
        if not missing or not all(one.clean and not one.doomed for one in missing):
            return None
        return self.swapper.start_load(node, "admission")

    def loaded(self, transfer: int, payloads: Sequence[Any]) -> None:
        """The device slots of a load's nodes, in the order of its items; the copy is under way."""
        for node, payload in zip(self.tree.transfers[transfer].nodes, payloads, strict=True):
            self.tree.set_payload(node, payload)
        self.swapper.unnamed.discard(transfer)

    def saved(self, transfer: int, payloads: Sequence[Any]) -> None:
        """The host slots of a save's or read's nodes, in the order of its items; the copy is under way."""
        for node, payload in zip(self.tree.transfers[transfer].nodes, payloads, strict=True):
            self.tree.set_host_payload(node, payload)
        self.swapper.unnamed.discard(transfer)

    def failed(self, transfer: int) -> list[Action]:
        """A copy could not be started: its nodes lose what they had gained."""
        return self.swapper.ended(transfer, False)

    # -- everything -------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all content; waiting requests stay. Both pools are the caller's to clear."""
        self.swapper.clear()
        self.tree.reset()
        self._queue_changed = True
        for request in self.waiting.first(len(self.waiting)):
            request.transfer = request.guarded = None

    def counters(self) -> dict[str, int]:
        """Decisions counted since start, by name."""
        return self.swapper.counts.as_dict()

    def fresh(self, payloads: PayloadOps) -> CacheManager:
        """An empty manager with the same settings and the costs it started with or was told last."""
        return CacheManager(
            self.page_size, self.device_slots, self.policy_name, payloads, replace(self.settings), self.costs
        )
