"""One scheduler without a model: what may happen now, and what each event does.

An event is what the scheduler does in one go: a request arrives, a pass over the queue, a batch, the end of a request,
a tick with copies that ended, an unload. Whatever the scheduler does not decide itself, the search chooses.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from elora_sglang.core.admission import Ask, Entry, Holding
from elora_sglang.core.executor import Executor
from elora_sglang.core.manager import CacheManager
from elora_sglang.core.trace import Recorder
from elora_sglang.core.tree.node import Node
from elora_sglang.eval.interleavings.memory import BrokenFile, Copy, Memory, Slots, TuplePayloads
from elora_sglang.eval.interleavings.scenes import COSTS, Anybody, Event, Scene

#: Seconds between ticks: longer than any copy of the scene is expected to take.
TICK_S = 1.0


@dataclass(eq=False)
class Request:
    """Attributes:
    rid, adapter, prompt: as asked.
    version: of its adapter's content, once it runs.
    answer: tokens generated so far.
    row: its device slots in token order, the tree's first.
    shared: how many of them are the tree's.
    node: the node that it locks.
    computed: tokens whose KV is in its row.
    """

    rid: str
    adapter: str | None
    prompt: tuple[int, ...]
    version: int = 0
    answer: int = 0
    row: Slots = ()
    shared: int = 0
    node: Node | None = None
    computed: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return self.prompt + (9,) * self.answer

    @property
    def keys(self) -> array[int]:
        """All of it, for the tree."""
        return array("q", self.tokens)

    def content(self, start: int, stop: int) -> list[object]:
        """What the slots of these tokens hold."""
        return [(self.adapter, self.version, self.tokens[: i + 1]) for i in range(start, stop)]


@dataclass
class World:
    """A manager, its memory, and the requests; made by replaying events.

    Attributes:
        sink: takes the manager's trace, line by line; ``None``: none is recorded.
        loaded, pinned: adapters that clients may name, and those of them that never leave the device.
        waiting, running: requests in order of arrival and admission.
    """

    scene: Scene
    sink: Callable[[str], None] | None = None
    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        scene = self.scene
        self.policy = scene.create_policy()
        self.manager = CacheManager(
            1, scene.device, scene.policy, TuplePayloads(), scene.settings(), COSTS, policy=self.policy
        )
        if self.sink is not None:
            Recorder(self.manager, self.sink)
        self.tree = self.manager.tree
        self.memory = Memory(self.manager, scene.device, scene.host)
        self.executor = Executor(self.manager, self.memory)
        self.loaded: set[str] = set()
        self.pinned: set[str] = set()
        self._asked = 0
        for adapter in scene.adapters:
            if adapter is not None:
                self._load(adapter)
        for event in scene.before:
            self.apply(event)

    # -- what may happen --------------------------------------------------------------------------

    def events(self) -> list[Event]:
        """All that may happen now, in an order that depends on the state alone."""
        scene = self.scene
        found: list[Event] = []
        if len(self.waiting) + len(self.running) < scene.live:
            names = [name for name in scene.adapters if name is None or name in self.loaded]
            found += [("ask", name, prompt) for name in names for prompt in scene.prompts]
        if self.waiting:
            found.append(("pass",))
            if any(self._needs_file(request) for request in self.waiting):
                found.append(("pass on a broken file",))
        if not all(self.is_done(request) for request in self.running):
            found.append(("run",))
        found += [("finish", i) for i, request in enumerate(self.running) if request.computed]
        found += [("abort", i) for i in range(len(self.waiting) + len(self.running))]
        for name in scene.adapters:
            if name is not None:
                found.append(("unload", name) if name in self.loaded else ("load", name))
                if scene.pins and name in self.loaded:
                    found.append(("unpin" if name in self.pinned else "pin", name))
        if not self.running:
            found.append(("flush",))
        found += self._evictions()
        found.append(("tick", None, True))
        first_of: set[str] = set()
        flying = [copy for copy in self.memory.copies if not copy.arrived]
        for i, copy in enumerate(self.memory.copies):
            if copy.arrived or (copy.kind != "read" and copy.kind in first_of):
                continue
            first_of.add(copy.kind)
            found.append(("tick", i, True))
            if self._may_fail(copy):
                found.append(("tick", i, False))
        if len(flying) > 1:
            found.append(("tick", "all", True))
        if scene.jams and scene.host and not self.memory.jammed:
            found.append(("jam",))
        return found

    def _evictions(self) -> list[Event]:
        if self.scene.policy != "any":
            return [("evict", None)] if self._candidates() else []
        return [("evict", i) for i in range(len(self._candidates()))]

    def _candidates(self) -> list[Node]:
        # Not by peeking: that would tidy the heaps, and so be an event.
        order = self.tree.parts.order
        return sorted((n for n in self.tree.walk() if order._may_leave_device(n)), key=lambda node: node.id)

    def _needs_file(self, request: Request) -> bool:
        node = self.tree.adapter(request.adapter)
        return request.adapter in self.loaded and (node is None or not (node.resident or node.clean))

    def _may_fail(self, copy: Copy) -> bool:
        # A load that is in use must not fail any more: the server stops rather than go on with wrong bytes.
        return copy.kind != "load" or not self.tree.parts.transfers.in_use(copy.transfers[0])

    def is_done(self, request: Request) -> bool:
        """Whether a running request has nothing left to compute."""
        return request.computed >= len(request.prompt) + self.scene.answers

    # -- what happens -----------------------------------------------------------------------------

    def apply(self, event: Event) -> None:
        """Let it happen. Raises whatever the core raises, and :class:`InvariantError` for slots in use."""
        name, *args = event
        happen: dict[str, Callable[..., None]] = {
            "ask": self._ask,
            "pass": self._pass,
            "pass on a broken file": self._pass_on_broken_file,
            "run": self._run,
            "finish": self._finish,
            "abort": self._abort,
            "unload": self._unload,
            "load": self._load,
            "pin": self._pin,
            "unpin": self._unpin,
            "flush": self._flush,
            "evict": self._evict,
            "tick": self._tick,
            "jam": self._jam,
            "empty": self._empty,
        }
        happen[name](*args)

    def _ask(self, adapter: str | None, prompt: tuple[int, ...]) -> None:
        request = Request(f"r{self._asked}", adapter, prompt)
        self._asked += 1
        self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        self.waiting.append(request)
        self._node(request.adapter)
        self.manager.enqueue(request.rid, request.adapter, request.keys[:-1])

    def _node(self, adapter: str | None) -> Node:
        """The adapter's node, registered on first use."""
        node = self.tree.adapter(adapter)
        if node is None:
            assert adapter is not None
            node = self.manager.register(adapter, self.scene.adapter_size, pinned=adapter in self.pinned)
        return node

    def _load(self, adapter: str) -> None:
        memory, size = self.memory, self.scene.adapter_size
        self.loaded.add(adapter)
        memory.versions[adapter] = memory.versions.get(adapter, 0) + 1
        node = self._node(adapter)
        if self.scene.placed and size <= len(memory.free_host_slots):
            slots = memory._host_slots(size)
            memory.bytes.update(zip(slots, memory.adapter_bytes(adapter, size), strict=True))
            self.manager.place_on_host(node, slots)

    def _unload(self, adapter: str) -> None:
        self.loaded.discard(adapter)
        self.pinned.discard(adapter)
        self.executor.run(self.manager.unregister(adapter))

    def _pin(self, adapter: str) -> None:
        self.pinned.add(adapter)
        self.manager.set_pinned(adapter, True)

    def _unpin(self, adapter: str) -> None:
        self.pinned.discard(adapter)
        self.manager.set_pinned(adapter, False)

    def _flush(self) -> None:
        self.memory.clear()
        self.manager.reset()

    def _evict(self, chosen: int | None) -> None:
        if chosen is None:
            self.executor.run(self.manager.evict(1))
            return
        assert isinstance(self.policy, Anybody)
        self.policy.chosen = node = self._candidates()[chosen]
        self.manager.reprioritize(node)
        self.executor.run(self.manager.evict(1))
        self.policy.chosen = None

    def _jam(self) -> None:
        self.memory.jammed = True

    def _tick(self, which: Any, ok: bool) -> None:
        memory = self.memory
        finished: list[tuple[int, bool]] = []
        if which == "all":
            for copy in memory.copies:
                memory.arrive(copy)
        elif which is not None:
            copy = memory.copies[which]
            if ok:
                memory.arrive(copy)
            else:
                memory.fail(copy)
                finished += [(transfer, False) for transfer in copy.transfers]
        finished += [
            (transfer, True) for copy in memory.copies if copy.arrived for transfer in copy.transfers
        ]
        memory.copies = [copy for copy in memory.copies if not copy.arrived]
        now = self.manager.now + TICK_S
        self.executor.run(
            self.manager.tick(now, memory.available(), finished, None, running=len(self.running))
        )
        self.executor.run(self.manager.collect())

    def _empty(self) -> None:
        """The base model's KV leaves both tiers, and adapters that are nobody's any more."""
        memory, manager = self.memory, self.manager
        memory.jammed = False
        self.executor.run(manager.evict(memory.sizes[0]))
        finished = [(transfer, True) for copy in memory.copies for transfer in copy.transfers]
        for copy in memory.copies:
            memory.arrive(copy)
        memory.copies = []
        for transfer, ok in finished:
            self.executor.run(manager.swapper.ended(transfer, ok))
        self.executor.run(manager.swapper.make_host_room(memory.sizes[1], float("inf"))[1])

    # -- admission --------------------------------------------------------------------------------

    def _pass_on_broken_file(self) -> None:
        self.memory.file_broken = True
        self._pass()
        self.memory.file_broken = False

    def _pass(self) -> None:
        """One pass over the queue, as ``integration/scheduler/admission.py`` makes it."""
        for request in list(self.waiting):
            if request.adapter is not None and request.adapter not in self.loaded:
                self._give_up(request)
        self.manager.begin_pass([one.rid for one in self.running])
        aside = 0
        for request in list(self.waiting):
            ask, holdings = self._asks(request, aside), self._holdings(request)
            self._node(request.adapter)
            entry = self.manager.consider(ask, holdings)
            if entry.may:
                entry = self._admit(request, aside)
            aside += entry.set_aside
            if entry.hopeless:
                self._give_up(request)
            if entry.closed:
                break

    def _give_up(self, request: Request) -> None:
        self.waiting.remove(request)
        self.manager.forget(request.rid)

    def _asks(self, request: Request, aside: int) -> Ask:
        need = len(request.prompt) + self.scene.answers
        return Ask(
            rid=request.rid,
            adapter=request.adapter,
            need=need,
            room=self.memory.available() + self.tree.evictable_size - aside,
            length=len(request.prompt),
            left=self.scene.answers,
            chunk_left=None,
            rows=self.scene.live - len(self.running),
            alone=not self.running,
        )

    def _holdings(self, request: Request) -> list[Holding]:
        if not self.manager.admission.wants_holdings(request.rid):
            return []
        return [
            Holding(one.rid, one.adapter, len(one.row) - one.shared, one.node)
            for one in self.running
            if one.node is not None
        ]

    def _admit(self, request: Request, aside: int) -> Entry:
        manager, adapter = self.manager, self._node(request.adapter)
        if not adapter.resident:
            read = not adapter.clean
            entry = manager.bring_in(self._asks(request, aside), self._holdings(request))
            if not entry.may:
                return entry
            try:
                if not self.executor.bring_in(adapter):
                    return manager.no_room(self._asks(request, aside), self._holdings(request))
            except BrokenFile:
                self._give_up(request)
                return Entry(False)
            manager.brought_in(read)
        match = manager.match(adapter, request.keys[:-1])
        held = match.node
        manager.lock(held)
        if match.host_length and not match.host_node.resident:
            load = manager.load_for(match.host_node)
            if load is not None and self.executor.load(load):
                match = manager.match(adapter, request.keys[:-1])
        manager.lock(match.node)
        manager.unlock(held)
        need = len(request.prompt) - match.length
        self.executor.make_room(need)
        if need > self.memory.available():
            manager.unlock(match.node)
            self.executor.run(manager.collect())
            ask, holdings = self._asks(request, aside), self._holdings(request)
            return manager.no_tokens(ask, match.node, match.length, holdings)
        shared = tuple(slot for one in self.tree.path(match.node) for slot in one.payload)
        request.row, request.shared = shared + self.memory.take(need), match.length
        request.node, request.computed = match.node, 0
        request.version = self.memory.versions.get(request.adapter or "", 0)
        manager.started(request.rid, match.node)
        self.waiting.remove(request)
        self.running.append(request)
        return Entry(True)

    # -- a batch, and the end ---------------------------------------------------------------------

    def _run(self) -> None:
        """One batch: who is new computes its prompt, the others one token each."""
        new = [request for request in self.running if not request.computed]
        for request in [] if new else list(self.running):
            if not self.is_done(request):
                self._grow(request)
        self.manager.batch([one.rid for one in self.running] if new else [], not new)
        for request in self.running:
            assert request.node is not None
            self.memory.settle(request.node)
            start = request.computed or request.shared
            self._read(request, start)
            self.memory.write(request.row[start:], request.content(start, len(request.row)))
            request.computed = len(request.row)
        for request in new:
            self._checkpoint(request)

    def _read(self, request: Request, stop: int) -> None:
        """What the batch reads: the request's KV so far, and its adapter, which must be there by now."""
        assert request.node is not None
        memory, adapter = self.memory, self.tree.adapter_of(request.node)
        memory.expect(request.row[:stop], request.content(0, stop))
        if adapter.key is not None:
            wanted = [(adapter.key, request.version, i) for i in range(adapter.size)]
            memory.expect(adapter.payload, wanted)

    def _grow(self, request: Request) -> None:
        """A slot for one token more; without, the request is retracted."""
        self.executor.make_room(1)
        if not self.memory.available():
            self._leave(request)
            request.answer = request.computed = 0
            if request.adapter is None or request.adapter in self.loaded:
                self._enqueue(request)
            return
        request.answer += 1
        request.row += self.memory.take(1)

    def _checkpoint(self, request: Request) -> None:
        """Its KV goes into the tree, duplicates are freed, and it locks its new end."""
        manager, held = self.manager, request.node
        assert held is not None
        if self.tree.is_doomed(held):
            return
        adapter, tokens = self.tree.adapter_of(held), request.keys
        inserted = manager.insert(adapter, tokens, None, request.row, len(tokens))
        if len(request.prompt) < len(tokens):
            manager.split_at(adapter, tokens, None, len(request.prompt))
        path = tuple(slot for one in self.tree.path(inserted.node) for slot in one.payload)
        self.memory.give_back(request.row[request.shared : inserted.matched])
        request.row, request.shared = path, len(path)
        manager.lock(inserted.node)
        manager.unlock(held)
        self.executor.run(manager.collect())
        request.node = inserted.node

    def _leave(self, request: Request) -> None:
        """It gives back its lock and what is its own."""
        self.running.remove(request)
        assert request.node is not None
        self.memory.give_back(request.row[request.shared :])
        self.manager.unlock(request.node)
        self.executor.run(self.manager.collect())
        request.row, request.shared = (), 0

    def _finish(self, index: int) -> None:
        request = self.running[index]
        self._checkpoint(request)
        self._end(request)

    def _end(self, request: Request) -> None:
        node = request.node
        self._leave(request)
        if node is not None and node.parent is not None:
            self.manager.finished(request.rid, node)
        request.node = None

    def _abort(self, index: int) -> None:
        if index < len(self.waiting):
            self._give_up(self.waiting[index])
        else:
            self._end(self.running[index - len(self.waiting)])
