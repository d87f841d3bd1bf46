"""What moves when: queue-driven prefetch, background backup, swap-out when busy, prefetch when idle.

Plans only, from the tree, the waiting queue and the costs; bounded work each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from elora_sglang.core.actions import Action, Free, FreeHost, Item, Load, Read, Save, Why
from elora_sglang.core.costs import Costs
from elora_sglang.core.swap_settings import SwapCounts, SwapSettings, switches
from elora_sglang.core.tree.candidates import Candidates
from elora_sglang.core.tree.eviction import never
from elora_sglang.core.tree.node import HostVictim, Kind, Match, Node, Victim
from elora_sglang.core.tree.tree import DependencyTree
from elora_sglang.core.waiting import Waiting, WaitingQueue

__all__ = ["BATCH", "HORIZON", "SwapCounts", "SwapSettings", "Swapper", "switches"]

#: Waiting requests that one plan looks at.
HORIZON = 64
#: Victims that one plan swaps out, and nodes that one plan saves or prefetches, at most.
BATCH = 8


@dataclass
class Plan:
    """A plan in the making: what to start, and the device slots that nobody has once it has been started."""

    free: int
    actions: list[Action] = field(default_factory=list)


@dataclass
class Swapper:
    """Plans copies for one tree; the manager owns it and feeds it time, free slots and costs."""

    tree: DependencyTree
    waiting: WaitingQueue
    settings: SwapSettings
    device_slots: int
    costs: Costs
    now: float = 0.0
    counts: SwapCounts = field(default_factory=SwapCounts)

    def __post_init__(self) -> None:
        tree = self.tree
        self._save_candidates = Candidates("save_queued", lambda n: -tree.policy.priority(n), self._may_save)
        self._load_candidates = Candidates("load_queued", lambda n: -tree.policy.priority(n), self._may_fetch)
        self._load_ends = 0.0  # when the last load in flight is expected to have arrived
        self._expected: dict[int, float] = {}
        self._read_failed: set[str] = set()
        #: Transfers whose slots the runtime has not named yet: their nodes cannot be split.
        self.unnamed: set[int] = set()

    # -- candidates -------------------------------------------------------------------------------

    @staticmethod
    def _may_save(node: Node) -> bool:
        return (
            node.kind == "kv" and node.resident and not node.host and node.transfer is None
            and node.adapter is not None and not node.adapter.doomed
        )  # fmt: skip

    @staticmethod
    def _may_fetch(node: Node) -> bool:
        parent, adapter = node.parent, node.adapter
        return (
            node.clean and not node.resident and parent is not None and parent.resident | (node.kind == "adapter")
            and adapter is not None and not adapter.doomed and node.size > 0
        )  # fmt: skip

    def offer(self, node: Node) -> None:
        """Something changed at ``node``: it may have become worth saving or fetching."""
        if self.settings.host_slots:
            self._offer(node)
            self._compact()

    def offer_path(self, node: Node) -> None:
        """The same for everything from ``node`` up to its adapter."""
        if not self.settings.host_slots:
            return
        while node.kind == "kv":
            self._offer(node)
            assert node.parent is not None
            node = node.parent
        self._offer(node)
        self._compact()

    def _offer(self, node: Node) -> None:
        if node.resident and node.host and node.save_queued is None and node.load_queued is None:
            return  # on both tiers, as most: nothing to save, nothing to fetch
        self._save_candidates.renew(node)
        self._load_candidates.renew(node)

    def _compact(self) -> None:
        nodes = self.tree.nodes
        self._save_candidates.compact(nodes)
        self._load_candidates.compact(nodes)

    def clear(self) -> None:
        """The tree was emptied."""
        self._save_candidates.clear()
        self._load_candidates.clear()
        self._expected.clear()
        self._read_failed.clear()
        self.unnamed.clear()
        self._load_ends = self.now

    # -- transfers --------------------------------------------------------------------------------

    def loads_in_flight(self) -> int:
        """Slots that loads in flight bring."""
        return sum(self.tree.transfers[id].size for id in self._expected)

    def remaining_s(self, transfer: int) -> float:
        """Seconds until a load in flight is expected to have arrived; 0 if it is not in flight."""
        return max(self._expected.get(transfer, self.now) - self.now, 0.0)

    def ended(self, id: int, ok: bool) -> list[Action]:
        """A transfer ended: the books, and what its failure freed."""
        transfer = self.tree.transfers.get(id)
        if transfer is None:
            return []  # of before a flush
        self._expected.pop(id, None)
        self.unnamed.discard(id)
        nodes, kind = list(transfer.nodes), transfer.kind
        self.counts.failed += not ok
        if kind == "read":
            key = nodes[0].key
            (self._read_failed.discard if ok else self._read_failed.add)(key)
        freed = self.tree.end_transfer(id, ok)
        for node in nodes:
            if node.parent is not None:
                self.offer(node)
                for child in node.children.values():
                    self.offer(child)
        return self.freed(freed.victims, freed.host_victims)

    @staticmethod
    def freed(victims: list[Victim], host_victims: list[HostVictim]) -> list[Action]:
        """The actions that hand out victims; none for none."""
        actions: list[Action] = []
        if victims:
            actions.append(Free(tuple(victims)))
        if host_victims:
            actions.append(FreeHost(tuple(host_victims)))
        return actions

    def start_load(self, node: Node, why: Why, rid: str | None = None) -> Load:
        """Begin the load of all that is missing on the way to ``node``; its device slots must be free."""
        transfer = self.tree.begin_load(node)
        begin = max(self.now, self._load_ends)
        self._load_ends = begin + self.costs.load_s(transfer.size)
        self._expected[transfer.id] = self._load_ends
        self.unnamed.add(transfer.id)
        counter = f"{why}_loads"
        setattr(self.counts, counter, getattr(self.counts, counter) + 1)
        return Load(transfer.id, tuple(Item.of(one) for one in transfer.nodes), transfer.size, why, rid)

    # -- room -------------------------------------------------------------------------------------

    @property
    def host_free(self) -> int:
        """Host slots that no node has."""
        return self.settings.host_slots - self.tree.host_size

    def make_host_room(self, need: int, worth: float) -> tuple[bool, list[Action]]:
        """Evict host leaves that are worth less than ``worth`` until ``need`` host slots are free.

        None for what the host could never hold.
        """
        victims: list[HostVictim] = self.tree.collect_doomed_host()
        while self.host_free < need <= self.settings.host_slots:
            node = self.tree.peek_host_victim()
            if node is None or node.guard or self.tree.policy.host_priority(node) >= worth:
                break
            found = self.tree.evict_host(1)
            self.counts.host_evictions += len(found)
            victims += found
        return self.host_free >= need, self.freed([], victims)

    def evict(self, need: int, kind: Kind = "kv", rank: int | None = None) -> tuple[int, list[Action]]:
        """Free device slots; returns how many and what to do.

        With ``rank`` (of a waiting request) nothing goes that it or an earlier one needs; the caller has made
        sure that the rest is enough. Without, everything unlocked may go, guarded nodes last.
        """
        save = self._saver() if self.settings.host_slots else never
        victims: list[Victim] = []
        freed = 0
        while freed < need:
            node = self.tree.peek_victim(kind)
            if node is None or (rank is not None and 0 < node.guard <= rank):
                break
            parent, guarded = node.parent, node.guard
            found = self.tree.evict(1, kind, save)
            freed += sum(victim.size for victim in found)
            victims += found
            # What doomed branches had may have been enough, and the node stays.
            self.counts.guard_breaks += bool(guarded) and not node.resident
            self.offer(node)
            if parent is not None:
                self.offer(parent)
        for victim in victims:
            if victim.transfer is not None:
                self.unnamed.add(victim.transfer)
            if victim.fate == "dropped":
                self.counts.drops += 1
            else:
                self.counts.demotions += 1
        return freed, self.freed(victims, [])

    def _saver(self) -> Callable[[Node], bool]:
        """Answers whether a dirty victim shall be saved: where that pays, and while the host has room."""
        room, costs = self.host_free, self.costs

        def save(node: Node) -> bool:
            nonlocal room
            start = sum(one.size for one in self.tree.path(node)[:-1])
            way_back = costs.save_s(node.size) + costs.load_s(node.size)
            if way_back >= costs.recompute_s(start, node.size) or node.size > room:
                return False
            room -= node.size
            self.counts.pressure_saves += 1
            return True

        return save

    # -- the plan ---------------------------------------------------------------------------------

    def plan(self, free: int) -> list[Action]:
        """What to start now, given ``free`` device slots that nobody has."""
        settings = self.settings
        if not settings.host_slots:
            return []
        plan = Plan(free)
        if settings.queue_prefetch or settings.guard:
            self._serve_queue(plan)
        if settings.backup:
            self._back_up(plan)
        used = 1 - plan.free / max(self.device_slots, 1)
        if used > settings.busy_watermark:
            self._swap_out(plan)
        elif settings.idle_prefetch and used < settings.idle_watermark:
            self._fetch_ahead(plan)
        return plan.actions

    # -- what waiting requests need ---------------------------------------------------------------

    def _serve_queue(self, plan: Plan) -> None:
        """Guard what the first of the queue need, and load what is missing of it, in order of arrival."""
        for request in self.waiting.first(HORIZON):
            node = self._missed_by(request)
            if node is not None and not self._bring(request, node, plan):
                return  # what comes later would only stand in front of it, on the link or in memory

    def _missed_by(self, request: Waiting) -> Node | None:
        """The end of what either tier has for the request, guarded; ``None``: there is nothing to do for it now."""
        tree, guards = self.tree, self.settings.guard
        if request.transfer is not None and request.transfer not in tree.transfers:
            request.transfer = None
        adapter = tree.adapter(request.adapter_key)
        if adapter is None:
            return None
        end = self._known_end(adapter, request)
        if end is not None and end.resident and adapter.resident:
            if end.transfer in self.unnamed:
                return None
            if not guards or request.guarded == end.id:
                tree.touch(end)
                return None  # all it needs is on the device, as before: most of the queue, mostly
        found = self._look_up(adapter, request, end)
        if found is None:
            return None  # this very plan moves the node that would be split; the next plan looks again
        if guards and request.guarded != found.host_node.id:
            tree.unguard(request.rank)
            tree.guard(found.host_node, request.rank)
            request.guarded = found.host_node.id
        return found.host_node

    def _bring(self, request: Waiting, node: Node, plan: Plan) -> bool:
        """Start the copy that the request waits for, if it needs one; whether requests behind it may have theirs."""
        if not self.settings.queue_prefetch or request.transfer is not None:
            return True
        adapter = self.tree.adapter_of(node)
        if not adapter.resident and not adapter.host:
            request.transfer = self._read(adapter, float("inf"), plan)
            return True
        missing = self.tree.missing(node)
        if not missing:
            return True
        if not all(one.clean for one in missing):
            if missing[0].transfer is not None:
                request.transfer = missing[0].transfer
            return True
        need = sum(one.size for one in missing)
        if self._would_crowd_the_link(need) or not self._make_room(node, need, request.rank, plan):
            return False
        load = self.start_load(node, "queue", request.rid)
        request.transfer = load.transfer
        plan.actions.append(load)
        plan.free -= need
        return True

    def _would_crowd_the_link(self, need: int) -> bool:
        in_flight = self.loads_in_flight()
        return in_flight > 0 and in_flight + need > self.settings.inflight_share * self.device_slots

    def _make_room(self, node: Node, need: int, rank: int, plan: Plan) -> bool:
        """Evict until ``need`` device slots are free for the load of ``node``; whether they are.

        Nothing goes that request ``rank`` or an earlier one needs, and nothing at all where the rest is not enough.
        """
        if need <= plan.free:
            return True
        tree = self.tree
        tree.lock(node)  # not to be evicted for its own sake
        enough = need <= plan.free + tree.evictable_size - tree.guarded_size(rank)
        if enough:
            gained, freeing = self.evict(need - plan.free, rank=rank)
            plan.actions += freeing
            plan.free += gained
        tree.unlock(node)
        return need <= plan.free

    def _known_end(self, adapter: Node, request: Waiting) -> Node | None:
        """The last node that shares tokens with the request, if it is known and ends where they end."""
        end = request.end
        if end is None or end.adapter is not adapter:
            return None
        return end if self.tree.still_ends(end, request.length, request.tokens) else None

    def _look_up(self, adapter: Node, request: Waiting, end: Node | None) -> Match | None:
        """What either tier has for the request, as :meth:`DependencyTree.match`; ``None``: cannot be said now.

        A request is looked up at every plan while it waits, and mostly its walk ends where it ended before,
        ``end``: then no token is compared.
        """
        tree, known, length = self.tree, end is not None, request.length
        if end is None:
            request.end = None
            end, length = tree.find(adapter, request.tokens, request.namespace)
        if end.transfer in self.unnamed:
            return None
        found = Match.of_walk(end, length, adapter)
        if not found.host_length and not found.length:
            return found
        if known:
            tree.touch(end)
            return found
        found = tree.match(adapter, request.tokens, request.namespace)  # splits where it ends
        request.end, request.length = tree.find(adapter, request.tokens, request.namespace)
        return found

    def _read(self, adapter: Node, worth: float, plan: Plan) -> int | None:
        """Begin to read an adapter's file into host slots, if those to be had are worth less than ``worth``."""
        if adapter.transfer is not None or adapter.key in self._read_failed or adapter.size == 0:
            return None
        fits, freeing = self.make_host_room(adapter.size, worth)
        plan.actions += freeing
        if not fits:
            return None
        transfer = self.tree.begin_read(adapter)
        self.unnamed.add(transfer.id)
        self.counts.reads += 1
        plan.actions.append(Read(transfer.id, adapter.key, adapter.size))
        return transfer.id

    def read_failed(self, key: str | None) -> bool:
        """Whether the last read of the adapter's file failed; admission then says why."""
        return key in self._read_failed

    # -- when nobody waits for it -----------------------------------------------------------------

    def _back_up(self, plan: Plan) -> None:
        """Save the KV that is worth most and has no host copy."""
        saving = sum(t.size for t in self.tree.transfers.values() if t.kind == "save")
        for _ in range(BATCH):
            if saving > self.settings.inflight_share * self.device_slots:
                return
            node = self._save_candidates.pop()
            if node is None:
                return
            saved = self._save(node, plan)
            if saved is None:
                return  # everything on the host is worth more
            saving += saved

    def _save(self, node: Node, plan: Plan) -> int | None:
        """Begin to save the path to ``node``; slots of that, 0 where it cannot be now, ``None`` without host room."""
        tree, adapter = self.tree, self.tree.adapter_of(node)
        if not adapter.host:
            # It came straight from its file, and no KV below it can be saved before it is on the host.
            self._read(adapter, tree.policy.priority(node), plan)
            return 0
        dirty = [one for one in tree.path(node) if not one.host]
        above = dirty[0].parent if dirty else None
        if above is None or not above.clean or any(one.transfer is not None for one in dirty):
            return 0  # offered again when what is above it has arrived
        tree.lock(node)
        fits, freeing = self.make_host_room(sum(one.size for one in dirty), tree.policy.priority(node))
        tree.unlock(node)
        plan.actions += freeing
        if not fits or not above.clean:
            return None
        transfer = tree.begin_save(node)
        self.unnamed.add(transfer.id)
        self.counts.backups += 1
        plan.actions.append(Save(transfer.id, tuple(Item.of(one) for one in transfer.nodes)))
        return transfer.size

    def _swap_out(self, plan: Plan) -> None:
        """Let clean leaves go until the device is below its busy watermark."""
        goal = int((1 - self.settings.busy_watermark) * self.device_slots)
        for _ in range(BATCH):
            node = self.tree.peek_victim()
            if plan.free >= goal or node is None or node.guard or not node.clean:
                return
            gained, freeing = self.evict(1)
            self.counts.swap_outs += 1
            plan.free += gained
            plan.actions += freeing

    def _fetch_ahead(self, plan: Plan) -> None:
        """Load the host copies that are worth most, while nothing else needs the link or the memory."""
        if len(self.waiting) or self._expected:
            return
        room = plan.free - int((1 - self.settings.idle_watermark) * self.device_slots)
        for _ in range(BATCH):
            node = self._load_candidates.pop()
            if node is None:
                return
            if node.size > room:
                self.offer(node)
                return
            room -= node.size
            plan.actions.append(self.start_load(node, "idle"))
