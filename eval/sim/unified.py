"""The cache of ``--elora`` in simulated time: the server's own manager over slots that are only counted.

A slot stands for a block of tokens. What the server's ``integration/`` does with slot tensors is done here with
numbers, in the same order of calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from elora_sglang.core.actions import Load, Read, Save
from elora_sglang.core.admission import Ask, Entry, Holding
from elora_sglang.core.executor import Executor
from elora_sglang.core.manager import CacheManager
from elora_sglang.core.policies.base import Policy
from elora_sglang.core.swapper import SwapSettings
from elora_sglang.core.tree.node import HostVictim, Node, Victim
from elora_sglang.eval.sim.cache import Admitted, Refused, Setting
from elora_sglang.eval.sim.clockwork import InFlight, Lane

if TYPE_CHECKING:
    from elora_sglang.eval.sim.requests import Request


class SlotCounts:
    """Payloads that are numbers of slots."""

    def slice(self, payload: int, start: int, stop: int) -> int:
        """How many there are."""
        return stop - start

    def split(self, payload: int, at: int) -> tuple[int, int]:
        """How many on each side."""
        return at, payload - at


class UnifiedCache:
    """Adapters and KV in one pool, below one tree, over two tiers.

    Args:
        setting: sizes, and what moving and computing costs.
        policy: a policy's name, or a policy.
        settings: of the swapper.
        history: whether KV outlives its request (S-LoRA's does not).

    Attributes:
        set_aside: slots that this pass keeps for requests that it looked past.
        closed: whether nobody else may enter in this pass.
        before_serving: told of each request just before it is served.
    """

    def __init__(
        self, setting: Setting, *, policy: str | Policy, settings: SwapSettings, history: bool = True
    ) -> None:
        machine = setting.machine
        self.machine, self.block_tokens, self.history = machine, setting.block_tokens, history
        self.costs = machine.costs(self.block_tokens)
        named = policy if isinstance(policy, str) else "lru"
        given = None if isinstance(policy, str) else policy
        self.free_slots = self.device_slots = setting.device_slots
        self.manager = CacheManager(1, self.device_slots, named, SlotCounts(), settings, self.costs, given)
        self.before_serving: Callable[[Request], None] | None = None
        self.executor = Executor(self.manager, self)
        self.tree = self.manager.tree
        self.set_aside, self.closed = 0, False
        self._running: Sequence[Request] = ()
        self._admitted: list[Request] = []
        self._blocking_s = 0.0
        self.now = 0.0
        self.loads = Lane(machine.load_bytes_s, machine.latency_s)
        self.saves = Lane(machine.save_bytes_s, machine.latency_s)
        self.disk = Lane(machine.disk_bytes_s, machine.latency_s)
        self._flying = InFlight()
        #: What was loaded for a request while it waited: KV slots, and whether its adapter.
        self._fetched: dict[str, tuple[int, bool]] = {}
        self._plan_due = 0.0
        self.place_adapters(setting)

    def place_adapters(self, setting: Setting) -> None:
        """Adapters are read once when they are registered: into the host pool, as far as it goes."""
        for name, size in setting.adapter_sizes().items():
            node = self.manager.register(name, size)
            if size <= setting.host_slots - self.tree.host_size:
                self.manager.place_on_host(node, size)

    def node(self, adapter: str | None) -> Node:
        """The adapter's node."""
        if adapter is None:
            return self.tree.base
        found = self.tree.adapter(adapter)
        assert found is not None
        return found

    # -- the backend of the executor -----------------------------------------------------------------

    def available(self) -> int:
        """Device slots that nobody has."""
        return self.free_slots

    def spares(self, need: int) -> bool:
        """Copies take what is free or could be; growing requests are served first by the server's own reserve."""
        return True

    def free(self, victims: Sequence[Victim]) -> list[int]:
        """Their device slots are free; saves start."""
        for victim in victims:
            if victim.payload is None:
                continue
            self.free_slots += victim.size
            if victim.fate == "saved":
                assert victim.transfer is not None
                self.manager.saved(victim.transfer, [victim.size])
                self._fly([victim.transfer], self.saves, victim.size)
        return []

    def free_host(self, victims: Sequence[HostVictim]) -> None:
        """The tree counts host slots itself."""

    def load(self, action: Load) -> bool:
        """Slots are taken, and the copy is under way; False where there are none."""
        if self.free_slots < action.size:
            return False
        self.free_slots -= action.size
        self.manager.loaded(action.transfer, [item.size for item in action.items])
        self._fly([action.transfer], self.loads, action.size)
        if action.rid is not None:
            kv, adapter = self._fetched.get(action.rid, (0, False))
            kv += sum(item.size for item in action.items if item.kind == "kv")
            adapter = adapter or any(item.kind == "adapter" for item in action.items)
            self._fetched[action.rid] = kv, adapter
        return True

    def place(self, action: Save) -> Save:
        """The host always has what the manager planned with."""
        self.manager.saved(action.transfer, [item.size for item in action.items])
        return action

    def start(self, placed: Sequence[Save]) -> list[int]:
        """They travel as one copy, as in the server."""
        size = sum(item.size for save in placed for item in save.items)
        self._fly([save.transfer for save in placed], self.saves, size)
        return []

    def read(self, action: Read) -> bool:
        """The file is under way to the host."""
        self.manager.saved(action.transfer, [action.size])
        self._fly([action.transfer], self.disk, action.size)
        return True

    def read_to_device(self, node: Node) -> int | None:
        """From the file over the host's link, while everybody waits; None where there is no room."""
        if self.free_slots < node.size:
            return None
        size = node.size * self.costs.slot_bytes
        read = self.disk.start(self.now, size)
        self._blocking_s = max(self.loads.start(read, size) - self.now, self._blocking_s)
        self.free_slots -= node.size
        return node.size

    def _fly(self, transfers: Sequence[int], lane: Lane, slots: int) -> None:
        ends = lane.start(self.now, slots * self.costs.slot_bytes)
        for transfer in transfers:
            self._flying.add(transfer, ends)

    def room(self) -> int:
        """Slots that are free or could be."""
        return self.free_slots + self.tree.evictable_size

    # -- the life of a request ------------------------------------------------------------------------

    def enqueue(self, req: Request) -> None:
        """It waits from now on."""
        self.manager.enqueue(req.rid, req.adapter, self._matchable(req), hints=req.hints)
        self._plan_due = self.now

    def _matchable(self, req: Request) -> Any:
        """All full blocks before the prompt's last token, which is always computed."""
        return req.prompt[: (req.prefill_tokens - 1) // self.block_tokens]

    def tick(self, now: float, running: int) -> None:
        """Time goes on; copies end, others start."""
        self.now = max(now, self.now)
        ended = [(transfer, True) for transfer in self._flying.arrived(self.now)]
        if ended or self.now >= self._plan_due or self.manager.settings.swap_interval_s == 0:
            self._plan_due = self.now + self.manager.settings.swap_interval_s
        self.executor.run(self.manager.tick(self.now, self.free_slots, ended, running=running))

    @property
    def active(self) -> bool:
        """Whether copies are in flight, or the last plan started any."""
        return bool(self._flying.ends)

    def next_event(self) -> float | None:
        """When a copy ends or the next plan is due."""
        arrives = self._flying.next
        if not self.manager.settings.host_slots:
            return arrives
        return self._plan_due if arrives is None else min(arrives, self._plan_due)

    # -- admission --------------------------------------------------------------------------------------

    def begin_pass(self, running: Sequence[Request], chunk: int) -> None:
        """A pass over the queue begins."""
        self._running, self._admitted = running, []
        self.set_aside, self.closed = 0, False
        self.manager.begin_pass([req.rid for req in running], chunk)

    def consider(self, req: Request, ask: Ask) -> bool:
        """Whether it may be looked at now: the manager's admission says so."""
        return self._obey(self.manager.consider(ask, self._holdings(req)))

    def _obey(self, entry: Entry) -> bool:
        self.set_aside += entry.set_aside
        self.closed |= entry.closed
        return entry.may

    @property
    def passing(self) -> bool:
        """Whether somebody was looked past and others may pass it, now or some batches later."""
        return self.manager.admission.stopped and not self.closed

    def _holdings(self, req: Request) -> list[Holding]:
        """What everybody who runs will give back; empty where no answer about ``req`` depends on it."""
        if not self.manager.admission.wants_holdings(req.rid):
            return []
        found = []
        for other in (*self._running, *self._admitted):
            left = -(-(other.answer_tokens - other.made) // self.block_tokens)
            found.append(Holding(other.rid, other.adapter, other.cache["own"] + left, other.cache["lock"]))
        return found

    def batch(self, prefilled: Sequence[Request], decodes: int) -> None:
        """A batch runs, or several decode steps."""
        if prefilled:
            self.manager.batch([req.rid for req in prefilled], False)
        for _ in range(decodes):
            self.manager.batch([], True)

    def admit(self, req: Request, ask: Ask) -> Admitted | Refused:
        """As ``EloraPrefillAdder.add_one_req``: adapter and tokens fit together, or it waits."""
        manager, tree = self.manager, self.tree
        adapter = self.node(req.adapter)
        tokens = self._matchable(req)
        match = manager.match(adapter, tokens)
        promised = self.room() - ask.room
        tier = self._tier(req, adapter)
        self._blocking_s = 0.0
        if not adapter.resident:
            refused = self._bring_in(req, ask, adapter)
            if refused is not None:
                return refused
            if not match.node.resident:
                match = manager.match(adapter, tokens)  # what had outlived its adapter made room for it
        held = match.node
        unlocked = sum(n.size for n in (*tree.path(held), adapter) if n.evictable)
        if ask.need - match.length + unlocked + promised > self.room():
            return self._no_tokens(req, ask._replace(room=self.room() - promised), held, match.length)
        manager.lock(held)
        last, loaded = held, 0
        if match.host_length:
            load = manager.load_for(match.host_node)
            if load is not None and self.executor.load(load):
                last, loaded = match.host_node, match.host_length
        manager.lock(last)
        manager.unlock(held)
        own = -(-(req.prefill_tokens + 1) // self.block_tokens) - match.length - loaded
        self.executor.make_room(own)
        if own > self.free_slots:
            manager.unlock(last)
            return self._no_tokens(req, ask._replace(room=self.room() - promised), last, match.length)
        self.free_slots -= own
        self._note(req, adapter, tier, match.length, loaded)
        manager.started(req.rid, last)
        req.cache = {"lock": last, "own": own, "start": match.length + loaded}
        self._admitted.append(req)
        return Admitted(self._arrival(last), self._blocking_s)

    def _bring_in(self, req: Request, ask: Ask, adapter: Node) -> Refused | None:
        """Bring its adapter to the device, or say why not."""
        manager, read = self.manager, not adapter.clean
        entry = manager.bring_in(ask, self._holdings(req))
        if entry.may:
            if self.executor.bring_in(adapter):
                manager.brought_in(read)
                return None
            entry = manager.no_room(ask, self._holdings(req))
        self._obey(entry)
        return Refused(ends_scan=False, hopeless=entry.hopeless)

    def _no_tokens(self, req: Request, ask: Ask, node: Node, cached: int) -> Refused:
        entry = self.manager.no_tokens(ask, node, cached, self._holdings(req))
        return Refused(hopeless=entry.hopeless)

    def _tier(self, req: Request, adapter: Node) -> str:
        if req.adapter is None:
            return "base"
        return "device" if adapter.resident else "host" if adapter.clean else "disk"

    def _note(self, req: Request, adapter: Node, tier: str, found: int, loaded: int) -> None:
        """Where its prefix and its adapter were."""
        # What came for it while it waited was on the host when it was queued, as the server counts.
        fetched, fetched_adapter = self._fetched.pop(req.rid, (0, False))
        fetched = min(fetched, found)
        device, host = found - fetched, loaded + fetched
        req.adapter_tier = "host" if tier == "device" and fetched_adapter else tier
        req.device, req.host = device * self.block_tokens, host * self.block_tokens
        req.done = req.device + req.host
        req.restore_s += self._restore(req, device, host, adapter)
        if self.before_serving is not None:
            self.before_serving(req)

    def _arrival(self, node: Node) -> float:
        """When all loads that bring ``node`` and what is above it have arrived."""
        ends, latest = self._flying.ends, 0.0
        while node.parent is not None:
            if node.transfer is not None and node.resident:
                latest = max(latest, ends.get(node.transfer, 0.0) if self._is_load(node.transfer) else 0.0)
            node = node.parent
        return latest

    def _is_load(self, transfer: int) -> bool:
        return self.tree.transfers[transfer].kind == "load"

    def _restore(self, req: Request, device: int, host: int, adapter: Node) -> float:
        """Seconds to restore what an infinite device would have had (the cost that a gap is measured in)."""
        costs, known = self.costs, min(req.known, len(self._matchable(req)))
        there = device + host
        seconds = costs.recompute_s(there, known - there) if known > there else 0.0
        seconds += host * costs.slot_bytes / costs.load_bytes_s
        if req.adapter_tier == "host":
            seconds += costs.load_s(adapter.size)
        elif req.adapter_tier == "disk":
            seconds += costs.disk_s(adapter.size) + costs.load_s(adapter.size)
        return seconds

    def refuse(self, req: Request) -> None:
        """It waits no more, because it can never fit."""
        self.manager.forget(req.rid)

    def computed(self, req: Request) -> None:
        """Its prompt's KV goes below its adapter, for others to use."""
        if self.history:
            self._insert(req, req.prompt)

    def _insert(self, req: Request, blocks: Any) -> None:
        notes = req.cache
        held: Node = notes["lock"]
        inserted = self.manager.insert(self.tree.adapter_of(held), blocks, None, len(blocks), len(blocks))
        start = notes["start"]
        duplicate = max(inserted.matched - start, 0)  # others computed it meanwhile
        self.free_slots += duplicate
        notes["own"] -= len(blocks) - start
        notes["start"] = len(blocks)
        self.manager.lock(inserted.node)
        self.manager.unlock(held)
        notes["lock"] = inserted.node
        self.executor.run(self.manager.collect())

    def grow(self, req: Request, slots: int) -> bool:
        """Give it more slots; False when there are none."""
        self.executor.make_room(slots)
        if slots > self.free_slots:
            return False
        self.free_slots -= slots
        req.cache["own"] += slots
        return True

    def end(self, req: Request, *, finished: bool) -> None:
        """Its KV stays in the tree, if it is to; the rest is free."""
        notes = req.cache
        if finished and self.history:
            # The last token was never fed to the model.
            self._insert(req, req.whole[: (req.tokens - 1) // self.block_tokens])
        self.free_slots += notes["own"]
        notes["own"] = 0
        node: Node = notes.pop("lock")
        self.manager.unlock(node)
        if finished:
            self.manager.finished(req.rid, node, req.hints)
        self.executor.run(self.manager.collect())

    # -- looking --------------------------------------------------------------------------------------

    def bytes_moved(self) -> dict[str, float]:
        """Bytes so far by way."""
        return {"load": self.loads.bytes_moved, "save": self.saves.bytes_moved, "disk": self.disk.bytes_moved}

    def resident_adapters(self) -> list[str]:
        """Names of the adapters that the device holds."""
        return [node.key for node in self.tree.adapters() if node.resident and node.key is not None]

    def usage(self) -> dict[str, int]:
        """Device slots: adapters, KV in the tree, KV of running requests alone, free, and invalid KV."""
        tree = self.tree
        held = tree.evictable_size + tree.protected_size
        return {
            "adapters": tree.adapter_size,
            "kv": held - tree.adapter_size,
            "running": self.device_slots - self.free_slots - held,
            "free": self.free_slots,
            "invalid": tree.invalid_kv_size,
        }

    def audit(self) -> None:
        """When nobody runs, no slot is lost and the tree is sound. Raises AssertionError or InvariantError."""
        if lost := self.usage()["running"]:
            raise AssertionError(f"{lost} slots are with nobody")
        self.tree.check()
