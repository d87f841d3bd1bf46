"""The invariants of ARCHITECTURE.md in one state, from slots and bytes; and that everything can end from there.

I1 and the books of the tree are its own ``check()``. The rest trusts only the list of requests and of copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from elora_sglang.core.errors import InvariantError
from elora_sglang.core.tree.node import Node
from elora_sglang.eval.interleavings.memory import HOST, Copy
from elora_sglang.eval.interleavings.scenes import Event
from elora_sglang.eval.interleavings.world import Request, World

#: Rounds of ticks and batches within which everything that goes on must be over.
ROUNDS = 24


def check(world: World) -> None:
    """Raise :class:`InvariantError` at the first broken rule."""
    world.tree.check(lambda payload: payload)
    nodes = list(world.tree.walk())
    _check_slots(world, nodes)
    _check_copies(world, nodes)
    _check_locks(world)
    _check_queue(world, nodes)
    _check_bytes(world, nodes)


def _require(holds: bool, rule: str, what: str) -> None:
    if not holds:
        raise InvariantError(f"{rule}: {what}")


# -- I2, I3 -------------------------------------------------------------------------------------------


def _check_slots(world: World, nodes: list[Node]) -> None:
    """Every slot of each tier belongs to the free list, to one node, or (device) to one running request."""
    memory, tree = world.memory, world.tree
    doomed = tree.parts.doomed
    own = [slot for request in world.running for slot in request.row[request.shared :]]
    device = [slot for node in nodes for slot in node.payload or ()]
    device += [slot for victim in doomed.victims for slot in victim.payload or ()]
    _partition("device", [*memory.free_slots, *device, *own], range(memory.sizes[0]))
    host = [slot for node in nodes for slot in node.host_payload or ()]
    host += [slot for victim in doomed.host_victims for slot in victim.payload or ()]
    _partition("host", [*memory.free_host_slots, *host], range(HOST, HOST + memory.sizes[1]))
    booked = memory.available() + tree.evictable_size + tree.protected_size + len(own)
    _require(booked == memory.sizes[0], "I2", f"free, evictable, protected and requests' slots are {booked}")
    free, counted = len(memory.free_host_slots), world.manager.swapper.host_free
    _require(free == counted, "I2", f"{free} host slots are free, the swapper counts {counted}")


def _partition(tier: str, owned: list[int], slots: Iterable[int]) -> None:
    count = Counter(owned)
    lost = [slot for slot in slots if not count[slot]]
    twice = [slot for slot, times in count.items() if times > 1]
    _require(not lost, "I2", f"{tier} slots {lost} belong to nobody")
    _require(not twice, "I3", f"{tier} slots {twice} have two owners")


# -- I4 -----------------------------------------------------------------------------------------------


def _check_copies(world: World, nodes: list[Node]) -> None:
    """The tree and the memory have the same copies in flight, and their slots are still those of their nodes."""
    by_transfer = {id: copy for copy in world.memory.copies for id in copy.transfers}
    _require(
        set(by_transfer) == set(world.tree.transfers),
        "I4",
        f"copies {sorted(by_transfer)} are in flight, the tree knows {sorted(world.tree.transfers)}",
    )
    payloads = {slot for node in nodes for slot in node.payload or ()}
    host = {slot for node in nodes for slot in node.host_payload or ()}
    for copy in world.memory.copies:
        device_side, host_side = _sides(copy)
        _require(host.issuperset(host_side), "I4", f"host slots of {copy} are no node's any more")
        _require(
            copy.released or payloads.issuperset(device_side),
            "I4",
            f"device slots of {copy} are no node's any more",
        )


def _sides(copy: Copy) -> tuple[Iterable[int], Iterable[int]]:
    if copy.kind == "load":
        return copy.target, copy.source
    return copy.source, copy.target


def _check_locks(world: World) -> None:
    """A node's locks are those of running requests and copies at or below it, no more and no fewer."""
    anchors = [request.node for request in world.running]
    anchors += [transfer.anchor for transfer in world.tree.transfers.values()]
    expected: Counter[int] = Counter()
    for anchor in anchors:
        one = anchor
        while one is not None and one.kind != "root":
            expected[one.id] += 1
            one = one.parent
    for node in world.tree.walk():
        if node.kind != "root":
            _require(
                node.locks == expected[node.id],
                "I4",
                f"{node!r} should have {expected[node.id]} locks, those of requests and copies",
            )


def _check_queue(world: World, nodes: list[Node]) -> None:
    """Who waits is who the manager thinks waits, and nobody else guards anything."""
    manager = world.manager
    waiting = {request.rid for request in world.waiting}
    queue = list(manager.waiting.first(99))
    _require({one.rid for one in queue} == waiting, "queue", f"{sorted(waiting)} wait, not {queue}")
    ranks = {one.rank for one in queue} | {0}
    stale = [node for node in nodes if node.guard not in ranks]
    _require(not stale, "queue", f"{stale} are guarded for requests that do not wait")
    demand = Counter(request.adapter for request in world.waiting)
    for key in world.scene.adapters:
        _require(manager.waiting_for(key) == demand[key], "queue", f"{demand[key]} requests wait for {key}")


# -- bytes (I5, and what a batch would read) ----------------------------------------------------------


def _check_bytes(world: World, nodes: list[Node]) -> None:
    """Complete nodes hold what their place says, on both tiers; so do the rows of running requests."""
    memory, tree = world.memory, world.tree
    awaited = {
        id for copy in memory.copies if copy.kind == "load" and not copy.arrived for id in copy.transfers
    }
    prefixes: dict[int, tuple[int, ...]] = {}
    versions = {one.id: memory.versions.get(one.key or "", 0) for one in tree.adapters()}
    for node in nodes:
        if node.kind == "root" or node.adapter is None:
            continue
        before = prefixes.get(node.parent.id, ()) if node.parent is not None else ()
        prefix = prefixes[node.id] = before + tuple(node.tokens)
        # A doomed adapter has none there: it may be older, but its bytes are of one version.
        version = versions.get(node.adapter.id)
        for tier, slots in (
            ("device", node.payload if node.transfer not in awaited else None),
            ("host", node.host_payload if node.clean else None),
        ):
            if slots is None:
                continue
            found = [memory.bytes.get(slot) for slot in slots]
            if version is None:
                version = _version(found)
            if node.kind == "adapter":
                expected: list[object] = [(node.key, version, i) for i in range(node.size)]
            else:
                spot = range(len(before), len(prefix))
                expected = [(node.adapter.key, version, prefix[: i + 1]) for i in spot]
            _require(found == expected, "bytes", f"{node!r} has {found} on the {tier}, not {expected}")
    for request in world.running:
        _check_row(world, request, awaited)


def _version(found: list[object]) -> int:
    first = found[0] if found else None
    return int(first[1]) if isinstance(first, tuple) and isinstance(first[1], int) else 0


def _check_row(world: World, request: Request, awaited: set[int]) -> None:
    assert request.node is not None
    under_way: set[int] = set()
    for node in world.tree.path(request.node):
        if node.transfer in awaited:
            under_way.update(node.payload or ())
    for i in range(request.computed or request.shared):
        slot = request.row[i]
        (expected,) = request.content(i, i + 1)
        found = world.memory.bytes.get(slot)
        _require(
            slot in under_way or found == expected,
            "bytes",
            f"{request.rid} would read {found}, not {expected}",
        )


# -- everything can end -------------------------------------------------------------------------------


def ending(world: World) -> Iterator[Event]:
    """Let all copies end, all requests run and finish, then unload everything: the events, each to be applied at once.

    Raises:
        InvariantError: something is stuck.
    """
    for _ in range(ROUNDS):
        if not world.waiting and not world.running:
            break
        yield from (("tick", "all", True), ("pass",), ("run",))
        while world.running and all(world.is_done(request) for request in world.running):
            yield ("finish", 0)
    stuck = [request.rid for request in (*world.waiting, *world.running)]
    _require(not stuck, "liveness", f"{stuck} do not end although all copies did")
    for name in sorted(world.loaded):
        yield ("unload", name)
    for _ in range(ROUNDS):
        if not world.tree.transfers:
            break
        yield ("tick", "all", True)
    _require(not world.tree.transfers, "liveness", "copies go on although nobody needs anything")
    yield ("empty",)


def check_empty(world: World) -> None:
    """Raise :class:`InvariantError` for whatever is left of a world that has ended."""
    check(world)
    memory = world.memory
    free = (memory.available(), len(memory.free_host_slots))
    _require(free == memory.sizes, "liveness", f"{free} slots are free in the end, not {memory.sizes}")
    _require(world.tree.nodes == 1, "liveness", f"the tree is not empty in the end:\n{world.tree.render()}")
