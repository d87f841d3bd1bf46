"""A runtime for the manager in a few lines: two pools of slots whose "bytes" are token prefixes, and late copies.

Serves requests the way the scheduler does: enqueue, ticks, admission with locks, prefill, decode, checkpoint.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from elora_sglang.core.actions import Action, Load, Read, Save
from elora_sglang.core.admission import Ask, Entry, Holding
from elora_sglang.core.costs import Costs
from elora_sglang.core.executor import Executor
from elora_sglang.core.manager import CacheManager, SwapSettings
from elora_sglang.core.tree.node import HostVictim, Node, Victim
from elora_sglang.core.tree.tree import InvariantError
from elora_sglang.eval.interleavings.memory import TuplePayloads

Slots = tuple[int, ...]
COSTS = Costs(1024, 1e6, 1e6, 1e5, 1e-5, 1e-3, 1e-6)


@dataclass
class Request:
    rid: str
    adapter: str | None
    prompt: tuple[int, ...]
    node: Node | None = None
    row: Slots = ()
    matched: int = 0
    left: int = 0


class Runtime:
    """One scheduler process without a model. ``rng`` decides arrivals, delays and faults."""

    def __init__(
        self,
        rng: random.Random,
        policy: str,
        settings: SwapSettings,
        *,
        page: int = 1,
        device: int = 400,
        faults: float = 0.0,
    ) -> None:
        self.rng, self.page, self.device, self.faults = rng, page, device, faults
        self.manager = CacheManager(page, device, policy, TuplePayloads(), settings, COSTS)
        self.free_slots = list(range(device))
        self.host_free = list(range(10_000, 10_000 + settings.host_slots))
        self.bytes: dict[int, object] = {}
        self.due: list[tuple[float, int, list[tuple[Slots, Slots]], dict[int, object]]] = []
        self.now = 0.0
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.chats: list[tuple[str | None, tuple[int, ...]]] = []
        self.served = self.hits = self.passes = self.looked_past = 0
        self.actions: list[Action] = []
        self.sizes = {f"a{i}": page * (4 + 3 * i) for i in range(6)}
        for key, size in self.sizes.items():
            self.manager.register(key, size)

    @property
    def executor(self) -> Executor:
        return Executor(self.manager, self)

    @property
    def tree(self):  # type: ignore[no-untyped-def]
        return self.manager.tree

    def run(self, actions: list[Action]) -> None:
        self.actions += actions
        self.executor.run(actions)

    # -- the backend of the executor ---------------------------------------------------------------

    def available(self) -> int:
        return len(self.free_slots)

    def spares(self, need: int) -> bool:
        return True

    def free(self, victims: Sequence[Victim]) -> list[int]:
        for victim in victims:
            if victim.fate == "saved":
                assert victim.transfer is not None
                target = self._host_slots(victim.size)
                self.manager.saved(victim.transfer, [target])
                kept = dict(zip(target, (self.bytes[s] for s in victim.payload), strict=True))
                self._later(victim.transfer, [], kept)
            self.free_slots.extend(victim.payload or ())
        return []

    def free_host(self, victims: Sequence[HostVictim]) -> None:
        for victim in victims:
            self.host_free.extend(victim.payload or ())

    def _host_slots(self, size: int) -> Slots:
        assert size <= len(self.host_free), "the manager promised host slots that do not exist"
        return tuple(self.host_free.pop() for _ in range(size))

    def _later(self, transfer: int, moves: list[tuple[Slots, Slots]], written: dict[int, object]) -> None:
        last = self.due[-1][0] if self.due else 0.0
        self.due.append((max(self.now, last) + self.rng.random() * 0.05, transfer, moves, written))

    def load(self, action: Load) -> bool:
        if action.size > len(self.free_slots) or self.rng.random() < self.faults:
            return False
        parts = []
        for item in action.items:
            assert item.host_payload is not None and item.payload is None
            parts.append(tuple(self.free_slots.pop() for _ in range(item.size)))
        self.manager.loaded(action.transfer, parts)
        moves = [(item.host_payload, part) for item, part in zip(action.items, parts, strict=True)]
        self._later(action.transfer, moves, {})
        return True

    def place(self, action: Save) -> Save | None:
        if self.rng.random() < self.faults:
            return None
        parts = [self._host_slots(item.size) for item in action.items]
        self.manager.saved(action.transfer, parts)
        self._later(action.transfer, [(i.payload, p) for i, p in zip(action.items, parts, strict=True)], {})
        return action

    def start(self, placed: Sequence[Save]) -> list[int]:
        return []

    def read(self, action: Read) -> bool:
        if self.rng.random() < self.faults:
            return False
        target = self._host_slots(action.size)
        self.manager.saved(action.transfer, [target])
        self._later(action.transfer, [], {s: (action.key, i) for i, s in enumerate(target)})
        return True

    def read_to_device(self, node: Node) -> Slots | None:
        if node.size > len(self.free_slots):
            return None
        payload = tuple(self.free_slots.pop() for _ in range(node.size))
        self.bytes.update({s: (node.key, i) for i, s in enumerate(payload)})
        return payload

    def _arrive(self, entry: tuple[float, int, list[tuple[Slots, Slots]], dict[int, object]]) -> None:
        _, _, moves, written = entry
        for source, target in moves:
            for s, t in zip(source, target, strict=True):
                self.bytes[t] = self.bytes[s]
        self.bytes.update(written)

    def settle(self, node: Node) -> None:
        """The fence of a batch: copies are FIFO, so everything up to what the path needs arrives now."""
        needed = {one.transfer for one in [self.tree.adapter_of(node), *self.tree.path(node)]} - {None}
        while any(entry[1] in needed for entry in self.due):
            entry = self.due.pop(0)
            self._arrive(entry)
            self.done.append((entry[1], True))

    # -- the scheduler ----------------------------------------------------------------------------

    def arrive(self) -> None:
        rng = self.rng
        if self.chats and rng.random() < 0.7:
            adapter, history = self.chats[-1 - min(int(rng.expovariate(0.12)), len(self.chats) - 1)]
        else:
            adapter, history = rng.choice([None, *self.sizes]), (rng.randrange(5),) * self.page
        prompt = history + tuple(rng.randrange(50) for _ in range(self.page * rng.randrange(1, 12)))
        prompt = prompt[: self.device // 4]
        request = Request(
            f"r{self.served + len(self.waiting) + len(self.running)}-{rng.random()}", adapter, prompt
        )
        self.waiting.append(request)
        self.manager.enqueue(request.rid, adapter, array("q", prompt[:-1]), None)

    def tick(self) -> None:
        self.now += self.rng.random() * 0.04
        self.done: list[tuple[int, bool]] = getattr(self, "done", [])
        while self.due and self.due[0][0] <= self.now:
            entry = self.due.pop(0)
            ok = self.rng.random() >= self.faults or self.tree.parts.transfers.in_use(entry[1])
            if ok:
                self._arrive(entry)
            self.done.append((entry[1], ok))
        finished, self.done = self.done, []
        self.run(self.manager.tick(self.now, len(self.free_slots), finished, None, len(self.running)))

    def step(self) -> None:
        """One scheduler iteration."""
        if self.rng.random() < 0.4 and len(self.waiting) < 12:
            self.arrive()
        if self.waiting and self.rng.random() < 0.03:
            gone = self.waiting.pop(self.rng.randrange(len(self.waiting)))
            self.manager.forget(gone.rid)
        self.tick()
        self._pass()
        for request in list(self.running):
            request.left -= 1
            if request.left <= 0:
                self._finish(request)
        self.run(self.manager.collect())

    def _pass(self) -> None:
        """One pass over the queue, as the manager's admission has it."""
        self.manager.begin_pass([one.rid for one in self.running])
        aside, admitted = 0, 0
        for request in list(self.waiting):
            entry = self.manager.consider(self._ask(request, aside), self._holdings(request))
            if entry.may:
                entry = self._admit(request, aside)
                admitted += entry.may
            aside += entry.set_aside
            if entry.closed or admitted == 2:
                break
        self.looked_past += self.manager.admission.stopped
        if self.running:
            prefilled = [one.rid for one in self.running[-admitted:]] if admitted else []
            self.manager.batch(prefilled, not admitted)
        self.passes += bool(self.waiting)
        held_back = self.waiting and not admitted and not self.running
        assert not held_back or self.tree.transfers or self.faults, "nothing runs, and nobody may"

    def _ask(self, request: Request, aside: int) -> Ask:
        length = len(request.prompt)
        return Ask(
            rid=request.rid,
            adapter=request.adapter,
            need=length,
            room=len(self.free_slots) + self.tree.evictable_size - aside,
            length=length,
            left=3,
            chunk_left=None,
            rows=12 - len(self.running),
            alone=not self.running,
        )

    def _holdings(self, request: Request) -> list[Holding]:
        if not self.manager.admission.wants_holdings(request.rid):
            return []
        return [
            Holding(one.rid, one.adapter, len(one.row) - one.matched, one.node)
            for one in self.running
            if one.node is not None
        ]

    def _admit(self, request: Request, aside: int) -> Entry:
        tree = self.tree
        adapter = tree.adapter(request.adapter)
        assert adapter is not None
        tokens = array("q", request.prompt[:-1])
        if not adapter.resident:
            read = not adapter.clean
            entry = self.manager.bring_in(self._ask(request, aside), self._holdings(request))
            if not entry.may:
                return entry
            if adapter.transfer is not None or not self.executor.bring_in(adapter):
                return self.manager.no_room(self._ask(request, aside), self._holdings(request))
            self.manager.brought_in(read)
        match = self.manager.match(adapter, tokens)
        held = match.node
        self.manager.lock(held)
        if match.host_length:
            load = self.manager.load_for(match.host_node)
            if load is not None:
                self.executor.load(load)
            match = self.manager.match(adapter, tokens)
        self.manager.lock(match.node)
        self.manager.unlock(held)
        need = len(request.prompt) - match.length
        self.executor.make_room(need)
        if need > len(self.free_slots):
            self.manager.unlock(match.node)
            return self.manager.no_tokens(
                self._ask(request, aside), match.node, match.length, self._holdings(request)
            )
        self.settle(match.node)
        shared = tuple(s for one in tree.path(match.node) for s in one.payload)
        for i, slot in enumerate(shared):  # what attention reads is what the tokens say
            assert self.bytes[slot] == (request.adapter, request.prompt[: i + 1]), (
                "wrong bytes would be served"
            )
        assert adapter.size == 0 or all(
            self.bytes[s] == (adapter.key, i) for i, s in enumerate(adapter.payload)
        )
        own = tuple(self.free_slots.pop() for _ in range(need))
        for i, slot in enumerate(own, match.length):
            self.bytes[slot] = (request.adapter, request.prompt[: i + 1])
        request.row, request.node, request.matched = shared + own, match.node, match.length
        request.left = self.rng.randrange(1, 4)
        self.hits += match.length
        self.manager.started(request.rid, match.node)
        self.waiting.remove(request)
        self.running.append(request)
        return Entry(True)

    def _finish(self, request: Request) -> None:
        self.running.remove(request)
        self.served += 1
        adapter = self.tree.adapter_of(request.node)
        inserted = self.manager.insert(
            adapter, array("q", request.prompt), None, request.row, len(request.prompt)
        )
        # Its own copies of what the tree had meanwhile; the shared part was never its own.
        self.free_slots.extend(request.row[request.matched : inserted.matched])
        whole = len(request.prompt) // self.page * self.page
        self.free_slots.extend(request.row[whole:])
        self.manager.unlock(request.node)
        self.manager.finished(request.rid, inserted.node)
        self.chats.append((request.adapter, request.prompt))

    # -- checks -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Both pools are shared out exactly among free lists, tree and running requests."""
        tree = self.tree
        tree.check(lambda payload: payload)
        own = sum(len(r.row) - r.matched for r in self.running)
        assert len(self.free_slots) + tree.evictable_size + tree.protected_size + own == self.device
        assert len(self.host_free) + tree.host_size == self.manager.host_slots
        for id in tree.transfers:
            assert any(entry[1] == id for entry in self.due) or any(done[0] == id for done in self.done), id


__all__ = ["COSTS", "InvariantError", "Runtime"]
