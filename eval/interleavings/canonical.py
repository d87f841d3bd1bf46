"""One name for all states that go on alike: nodes, slots, copies and requests are numbered by where they are.

Two states with one name differ at most in ids, in which slots are whose, in how late it is, and in which of the alike
adapters is which. What decides later on is kept: order of ids (it breaks ties), order of recency, entries of heaps.
"""

from __future__ import annotations

import marshal
from collections.abc import Iterable
from hashlib import blake2b
from itertools import permutations
from typing import Any

from elora_sglang.core.tree.candidates import Candidates
from elora_sglang.core.tree.node import Node
from elora_sglang.eval.interleavings import snapshot
from elora_sglang.eval.interleavings.frozen import freeze
from elora_sglang.eval.interleavings.scenes import ANY
from elora_sglang.eval.interleavings.world import World

#: A clock of the waiting queue that runs this long lets everybody of a small scene pass.
LONG = 16

#: Policies that look at nothing but the order in which nodes were touched, or at nothing.
PLAIN = ("lru", ANY)


def name(world: World) -> bytes:
    """16 bytes that are equal for equal states."""
    if world.scene.policy not in PLAIN:
        # To ask a policy for a priority may make it take up a ghost: only a copy is asked.
        world = snapshot.make(snapshot.take(world))
    adapters = [key for key in world.scene.adapters if key is not None]
    base = [key for key in world.scene.adapters if key is None]
    return min(_digest(_describe(world, [*base, *order])) for order in permutations(adapters))


def _digest(value: Any) -> bytes:
    return blake2b(marshal.dumps(value, 2), digest_size=16).digest()


def _ranks(values: Iterable[float]) -> dict[float, int]:
    return {value: rank for rank, value in enumerate(sorted(set(values)))}


def _describe(world: World, adapters: list[str | None]) -> tuple[Any, ...]:
    """The state in plain tuples, the adapters in this order."""
    tree = world.tree
    place = {key: i for i, key in enumerate(adapters)}
    nodes: list[Node] = []
    tops = [(place[node.key], node.id, node) for node in tree.adapters() if node.key in place]
    doomed = tree.parts.structure.doomed.values()
    tops += [(len(place) + place[node.key], node.id, node) for node in doomed]
    parents: list[int] = []
    for _, _, top in sorted(tops, key=lambda entry: entry[:2]):
        _number(top, -1 - place[top.key], nodes, parents)
    number = {node.id: i for i, node in enumerate(nodes)}
    return (
        tuple(parents),
        _nodes(world, nodes),
        _copies(world, number),
        _requests(world, place, number),
        tuple(sorted((place[key], key in world.pinned) for key in world.loaded)),
        tuple(sorted(place[key] for key in world.manager.swapper._read_failed if key in place)),
        world.memory.jammed,
        _policy(world, number),
    )


def _number(node: Node, above: int, nodes: list[Node], parents: list[int]) -> None:
    here = len(nodes)
    nodes.append(node)
    parents.append(above)
    for child in sorted(node.children.values(), key=lambda one: tuple(one.tokens)):
        _number(child, here, nodes, parents)


def _nodes(world: World, nodes: list[Node]) -> tuple[Any, ...]:
    """Each node's state; ids, times and keys of heaps as ranks, because only their order matters."""
    ids = _ranks(node.id for node in nodes)
    waiting = {request.rank: i + 1 for i, request in enumerate(world.manager.waiting.first(99))}
    columns: list[list[Any]] = [
        [
            (
                tuple(node.tokens),
                node.resident,
                node.host,
                node.locks,
                waiting.get(node.guard, 0),
                node.pinned,
                node.doomed,
                ids[node.id],
            )
            for node in nodes
        ]
    ]
    if world.scene.policy != ANY:
        ticks = _ranks(node.last_tick for node in nodes)
        columns.append([ticks[node.last_tick] for node in nodes])
    if world.scene.policy not in PLAIN:
        columns.append([(node.visits, node.last_use, node.last_tick) for node in nodes])
    order, swapper = world.tree.parts.order, world.manager.swapper
    heaps = (order.kv, order.adapters, order.host, swapper._save_candidates, swapper._load_candidates)
    columns += [_entries(heap, nodes) for heap in heaps]
    return tuple(zip(*columns, strict=True))


def _entries(heap: Candidates, nodes: list[Node]) -> list[Any]:
    """Of each node: its entry in the heap among all entries and all keys of today."""
    entries = [heap._get(node) for node in nodes]
    if not any(entry is not None for entry in entries):
        return entries
    keys = [heap._key(node) for node in nodes if node.kind == "kv" or node.size]
    rank = _ranks([*keys, *(entry for entry in entries if entry is not None)])
    return [None if entry is None else rank[entry] for entry in entries]


def _copies(world: World, number: dict[int, int]) -> tuple[Any, ...]:
    """What is in flight, in order of its start; and which free slots a released save still reads."""
    tree, memory = world.tree, world.memory
    reads: dict[int, int] = {}
    copies = []
    for i, copy in enumerate(memory.copies):
        if copy.released and not copy.arrived:
            reads.update(dict.fromkeys(copy.source, i + 1))
        carried = []
        for id in copy.transfers:
            transfer = tree.transfers[id]
            later = [
                number[child.id]
                for node in transfer.nodes
                for child in node.children.values()
                if copy.kind == "load" and child.resident and child.arrival > transfer.begun
            ]
            anchor = None if transfer.anchor is None else number[transfer.anchor.id]
            carried.append((tuple(number[node.id] for node in transfer.nodes), anchor, tuple(sorted(later))))
        copies.append((copy.kind, copy.released, copy.arrived, tuple(carried)))
    return tuple(copies), tuple(reads.get(slot, 0) for slot in memory.free_slots) if reads else ()


def _requests(world: World, place: dict[str | None, int], number: dict[int, int]) -> tuple[Any, ...]:
    """The queue with its guards and clocks, and who runs."""
    manager, tree = world.manager, world.tree
    admission, passing = manager.admission, manager.admission.overtaking
    flying = {id: i for i, id in enumerate(tree.transfers)}
    now = passing.batches - 2 * passing.lag
    queue = []
    by_rank = tree.parts.guards._by_rank
    for one in manager.waiting.first(99):
        clock = passing._clocks.get(one.rid)
        queue.append(
            (
                place[one.adapter_key],
                tuple(one.tokens),
                flying.get(one.transfer, -1) if one.transfer is not None else None,
                number.get(one.guarded, -1) if one.guarded is not None else None,
                number.get(one.end.id, -1) if one.end is not None else None,
                one.length,
                tuple(sorted(number.get(id, -1) for id in by_rank.get(one.rank, ()))),
                None if clock is None else min(now - clock, LONG),
            )
        )
    tickets = _ranks([*passing._waiting.values(), *(ticket for ticket, _ in passing._overtakers.values())])
    running = []
    for request in world.running:
        assert request.node is not None
        over = passing._overtakers.get(request.rid)
        running.append(
            (
                place[request.adapter],
                request.prompt,
                request.answer,
                request.computed,
                request.shared,
                len(request.row),
                number.get(request.node.id, -1),
                None if over is None else (tickets[over[0]], max(over[1] - passing._decodes, 0)),
            )
        )
    order = tuple(tickets[passing._waiting[request.rid]] for request in world.waiting)
    state = (admission.looked_past, admission._entered, bool(manager._running), passing._chunks)
    return tuple(queue), order, tuple(running), state


def _policy(world: World, number: dict[int, int]) -> Any:
    """What the policy remembers, where it remembers anything."""
    if world.scene.policy in PLAIN:
        return None
    view = world.manager

    def numbered(node: Node) -> int:
        return number.get(node.id, -1)

    states = [freeze(node.policy_state, numbered, ()) for node in world.tree.walk()]
    return freeze(vars(world.policy), numbered, (view,)), states, view.now, view._load_sum, view.batch_size
