"""What moves when: queue-driven prefetch, background backup, swap-out when busy, prefetch when idle.

Plans only, from the tree, the waiting queue and the costs; bounded work each time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from elora_sglang.core.actions import Action, Free, FreeHost, Item, Load, Read, Save, Why
from elora_sglang.core.costs import Costs
from elora_sglang.core.policies.base import LORA_SHARE
from elora_sglang.core.tree.candidates import Candidates
from elora_sglang.core.tree.node import HostVictim, Kind, Match, Node, Victim
from elora_sglang.core.tree.tree import DependencyTree
from elora_sglang.core.waiting import Waiting, WaitingQueue

#: Waiting requests that one plan looks at.
HORIZON = 64
#: Victims that one plan swaps out, and nodes that one plan saves or prefetches, at most.
BATCH = 8


@dataclass(frozen=True)
class SwapSettings:
    """How eager the swapper is.

    Attributes:
        host_slots: size of the host pool; 0: no host tier, nothing is ever copied.
        busy_watermark: share of the device in use above which clean leaves are swapped out.
        idle_watermark: share below which host copies are fetched ahead.
        swap_interval_s: seconds between plans that nothing else calls for.
        queue_prefetch, idle_prefetch, backup, guard: the parts, each can be switched off.
        inflight_share: share of the device that loads in flight may take together.
        lora_share: share of the device that adapters get where they do not compete with KV.
        without: names of switched-off parts and terms.

    Raises:
        ValueError: a share outside 0..1, a watermark order that makes no sense, or a negative number.
    """

    host_slots: int = 0
    busy_watermark: float = 0.95
    idle_watermark: float = 0.70
    swap_interval_s: float = 0.1
    queue_prefetch: bool = True
    idle_prefetch: bool = True
    backup: bool = True
    guard: bool = True
    inflight_share: float = 0.25
    lora_share: float = LORA_SHARE
    without: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not 0 <= self.idle_watermark <= self.busy_watermark <= 1 or not 0 < self.inflight_share <= 1:
            raise ValueError(
                "watermarks and shares must satisfy 0 <= idle <= busy <= 1 and 0 < inflight <= 1"
            )
        if self.host_slots < 0 or self.swap_interval_s < 0:
            raise ValueError("host_slots and swap_interval_s must be at least 0")


def parts(without: frozenset[str]) -> dict[str, Any]:
    """Arguments of :class:`SwapSettings` where these parts and terms are switched off (``--elora-without``)."""
    on = {name: name.replace("_", "-") not in without for name in ("queue_prefetch", "idle_prefetch")}
    return {**on, "backup": "backup" not in without, "guard": "guard" not in without, "without": without}


@dataclass
class SwapCounts:
    """Counted decisions since start."""

    queue_loads: int = 0
    idle_loads: int = 0
    admission_loads: int = 0
    backups: int = 0
    pressure_saves: int = 0
    swap_outs: int = 0
    reads: int = 0
    demotions: int = 0
    drops: int = 0
    guard_breaks: int = 0
    host_evictions: int = 0
    failed: int = 0

    def as_dict(self) -> dict[str, int]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


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
        room = self.host_free

        def save(node: Node) -> bool:
            nonlocal room
            start = sum(one.size for one in self.tree.path(node)[:-1])
            pays = self.costs.save_s(node.size) + self.costs.load_s(node.size) < self.costs.recompute_s(
                start, node.size
            )
            if not pays or node.size > room:
                return False
            room -= node.size
            self.counts.pressure_saves += 1
            return True

        victims: list[Victim] = []
        freed = 0
        while freed < need:
            node = self.tree.peek_victim(kind)
            if node is None or (rank is not None and 0 < node.guard <= rank):
                break
            parent, guarded = node.parent, node.guard
            found = self.tree.evict(1, kind, save if self.settings.host_slots else _never)
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

    # -- the plan ---------------------------------------------------------------------------------

    def plan(self, free: int) -> list[Action]:
        """What to start now, given ``free`` device slots that nobody has."""
        if not self.settings.host_slots:
            return []
        actions: list[Action] = []
        if self.settings.queue_prefetch or self.settings.guard:
            free = self._serve_queue(free, actions)
        if self.settings.backup:
            self._back_up(actions)
        used = 1 - free / max(self.device_slots, 1)
        if used > self.settings.busy_watermark:
            self._swap_out(free, actions)
        elif self.settings.idle_prefetch and used < self.settings.idle_watermark:
            self._fetch_ahead(free, actions)
        return actions

    def _serve_queue(self, free: int, actions: list[Action]) -> int:
        tree, guards = self.tree, self.settings.guard
        for request in self.waiting.first(HORIZON):
            if request.transfer is not None and request.transfer not in tree.transfers:
                request.transfer = None
            adapter = tree.adapter(request.adapter_key)
            if adapter is None:
                continue
            end = self._known_end(adapter, request)
            if end is not None and end.resident and adapter.resident:
                if end.transfer in self.unnamed:
                    continue
                if not guards or request.guarded == end.id:
                    tree.touch(end)
                    continue  # all it needs is on the device, as before: most of the queue, mostly
            found = self._look_up(adapter, request, end)
            if found is None:
                continue  # this very plan moves the node that would be split; the next plan looks again
            node = found.host_node
            if guards and request.guarded != node.id:
                self.tree.unguard(request.rank)
                self.tree.guard(node, request.rank)
                request.guarded = node.id
            if not self.settings.queue_prefetch or request.transfer is not None:
                continue
            if not adapter.resident and not adapter.host:
                request.transfer = self._read(adapter, float("inf"), actions)
                continue
            missing = self.tree.missing(node)
            if not missing or not all(one.clean for one in missing):
                if missing and missing[0].transfer is not None:
                    request.transfer = missing[0].transfer
                continue
            need = sum(one.size for one in missing)
            in_flight = self.loads_in_flight()
            if in_flight and in_flight + need > self.settings.inflight_share * self.device_slots:
                break  # what comes later would only stand in front of it on the link
            if need > free:
                self.tree.lock(node)  # not to be evicted for its own sake
                if need > free + tree.evictable_size - tree.guarded_size(request.rank):
                    self.tree.unlock(node)
                    break
                gained, freeing = self.evict(need - free, rank=request.rank)
                self.tree.unlock(node)
                actions += freeing
                free += gained
                if need > free:
                    break
            load = self.start_load(node, "queue", request.rid)
            request.transfer = load.transfer
            actions.append(load)
            free -= need
        return free

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

    def _read(self, adapter: Node, worth: float, actions: list[Action]) -> int | None:
        """Begin to read an adapter's file into host slots, if those to be had are worth less than ``worth``."""
        if adapter.transfer is not None or adapter.key in self._read_failed or adapter.size == 0:
            return None
        fits, freeing = self.make_host_room(adapter.size, worth)
        actions += freeing
        if not fits:
            return None
        transfer = self.tree.begin_read(adapter)
        self.unnamed.add(transfer.id)
        self.counts.reads += 1
        actions.append(Read(transfer.id, adapter.key, adapter.size))
        return transfer.id

    def read_failed(self, key: str | None) -> bool:
        """Whether the last read of the adapter's file failed; admission then says why."""
        return key in self._read_failed

    def _back_up(self, actions: list[Action]) -> None:
        saving = sum(t.size for t in self.tree.transfers.values() if t.kind == "save")
        for _ in range(BATCH):
            if saving > self.settings.inflight_share * self.device_slots:
                return
            node = self._save_candidates.pop()
            if node is None:
                return
            adapter = node.adapter
            if adapter is not None and not adapter.host:
                # It came straight from its file, and no KV below it can be saved before it is on the host.
                self._read(adapter, self.tree.policy.priority(node), actions)
                continue
            chain = [one for one in self.tree.path(node) if not one.host]
            above = chain[0].parent if chain else None
            if (
                not chain
                or above is None
                or not above.clean
                or any(one.transfer is not None for one in chain)
            ):
                continue  # offered again when what is above it has arrived
            need = sum(one.size for one in chain)
            self.tree.lock(node)
            fits, freeing = self.make_host_room(need, self.tree.policy.priority(node))
            self.tree.unlock(node)
            actions += freeing
            if not fits or not above.clean:
                return  # everything on the host is worth more
            transfer = self.tree.begin_save(node)
            self.unnamed.add(transfer.id)
            self.counts.backups += 1
            saving += transfer.size
            actions.append(Save(transfer.id, tuple(Item.of(one) for one in transfer.nodes)))

    def _swap_out(self, free: int, actions: list[Action]) -> None:
        goal = int((1 - self.settings.busy_watermark) * self.device_slots)
        for _ in range(BATCH):
            node = self.tree.peek_victim()
            if free >= goal or node is None or node.guard or not node.clean:
                return
            gained, freeing = self.evict(1)
            self.counts.swap_outs += 1
            free += gained
            actions += freeing

    def _fetch_ahead(self, free: int, actions: list[Action]) -> None:
        if len(self.waiting) or self._expected:
            return  # real work has the link and the memory
        room = free - int((1 - self.settings.idle_watermark) * self.device_slots)
        for _ in range(BATCH):
            node = self._load_candidates.pop()
            if node is None:
                return
            if node.size > room:
                self.offer(node)
                return
            room -= node.size
            actions.append(self.start_load(node, "idle"))


def _never(node: Node) -> bool:
    return False
