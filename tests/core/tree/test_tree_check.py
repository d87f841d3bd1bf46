"""``check()`` must trip: one planted corruption per rule."""

from __future__ import annotations

import traceback
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from elora_sglang.core.policies import create_policy
from elora_sglang.core.tree import checks
from elora_sglang.core.tree.tree import DependencyTree, InvariantError, Node, Transfer, Victim
from elora_sglang.eval.interleavings.memory import TuplePayloads


@dataclass
class World:
    """root → a (locked) → upper → lower (locked); root → b → KV; root → c → d; pages of two tokens.

    c is complete on both tiers, and d is being saved.
    """

    tree: DependencyTree
    a: Node
    b: Node
    c: Node
    d: Node
    upper: Node
    lower: Node


def build() -> World:
    tree = DependencyTree(2, create_policy("lru"), TuplePayloads())
    a, b = tree.register_adapter("a", 2), tree.register_adapter("b", 4)
    tree.make_resident(a, (0, 1))
    tree.make_resident(b, (2, 3, 4, 5))
    lower = tree.insert(a, array("q", [1, 2, 3, 4]), "space", (6, 7, 8, 9), 4).node
    upper = tree.split_at(a, array("q", [1, 2, 3, 4]), "space", 2)
    tree.insert(b, array("q", [1, 2]), None, (10, 11), 2)
    tree.lock(lower)
    c = tree.register_adapter("c", 2)
    tree.place_on_host(c, (100, 101))
    tree.make_resident(c, (12, 13))
    d = tree.insert(c, array("q", [5, 6]), None, (14, 15), 2).node
    tree.begin_save(d)
    tree.set_host_payload(d, (102, 103))
    return World(tree, a, b, c, d, upper, lower)


def check(world: World) -> None:
    world.tree.check(lambda payload: payload)


def test_the_world_is_sound() -> None:
    check(build())


def corrupt(path: str, value: object) -> Callable[[World], None]:
    """Set an attribute of the world, named by a dotted path."""

    def plant(world: World) -> None:
        *owners, name = path.split(".")
        target: object = world
        for owner in owners:
            target = getattr(target, owner)
        setattr(target, name, value(getattr(target, name)) if callable(value) else value)

    return plant


def hang_kv_below_the_root(world: World) -> None:
    del world.a.children[world.upper.key]
    world.a.resident_children = 0
    world.upper.parent = world.tree.root
    world.tree.root.children[world.upper.key] = world.upper


def move_to_another_adapter(world: World) -> None:
    del world.a.children[world.upper.key]
    world.a.resident_children, world.b.resident_children = 0, 2
    world.upper.parent = world.b
    world.b.children[world.upper.key] = world.upper


def second_root(world: World) -> None:
    world.upper.kind = "root"


def doom_without_locks(world: World) -> None:
    world.tree.drop_branch(world.a)
    world.a.children, world.a.resident_children, world.a.locks = {}, 0, 0


def on_no_tier(world: World) -> None:
    world.lower.resident, world.lower.payload, world.upper.resident_children = False, None, 0


def forget_the_copy_of_the_adapter(world: World) -> None:
    world.c.host, world.c.host_payload = False, None


def transfer(world: World) -> Transfer:
    assert world.d.transfer is not None
    return world.tree.transfers[world.d.transfer]


def lose_an_entry(world: World) -> None:
    world.tree.parts.order.kv._heap.clear()


def forget_to_queue(world: World) -> None:
    for node in world.tree.walk():
        node.queued = None


def queue_too_high(world: World) -> None:
    leaf = next(iter(world.b.children.values()))
    leaf.queued = 10.0**6
    world.tree.parts.order.kv._heap.append((leaf.queued, leaf.id, leaf))


def flood_the_heap(world: World) -> None:
    world.tree.parts.order.kv._heap.extend([(-1.0, 0, world.a)] * 200)


def one_slot_two_owners(world: World) -> None:
    world.b.payload = (2, 3, 4, 8)


def lose_an_orphan(world: World) -> None:
    world.tree.parts.doomed.victims.append(Victim(99, "kv", 1, (50, 51), 2))


CORRUPTIONS: list[tuple[str, str, Callable[[World], None]]] = [
    ("I1", "reachable twice, or two share an id", corrupt("lower.id", lambda _: 3)),
    ("I1", "base model's node", corrupt("tree.base.resident", False)),
    ("I1", "base model's node", corrupt("tree.base.size", 1)),
    ("I1", "does not belong where it hangs", corrupt("lower.parent", None)),
    ("I1", "does not belong where it hangs", corrupt("lower.key", "other")),
    ("I1", "below the root", hang_kv_below_the_root),
    ("I1", "names another adapter", move_to_another_adapter),
    ("I1", "second root", second_root),
    ("I1", "must hang below the root", corrupt("b.adapter", None)),
    ("I1", "list of doomed adapters", corrupt("b.doomed", True)),
    ("I1", "doomed and held by nothing", doom_without_locks),
    ("I1", "has the payload", corrupt("b.payload", None)),
    ("I1", "has the payload", corrupt("lower.payload", None)),
    ("I1", "has the payload", corrupt("c.host_payload", None)),
    ("I1", "on no tier", on_no_tier),
    ("I1", "children on device and host", corrupt("upper.resident_children", 7)),
    ("I1", "children on device and host", corrupt("c.host_children", 0)),
    ("I1", "on the host, .* above it is not", forget_the_copy_of_the_adapter),
    ("I4", "not part of its transfer", lambda w: transfer(w).nodes.clear()),
    ("I4", "is not locked", lambda w: setattr(transfer(w), "anchor", w.b)),
    ("I4", "left while transfer", lambda w: transfer(w).nodes.append(w.lower)),
    ("I2", "host_size", corrupt("tree.parts.residency.host_size", 0)),
    ("I2", "adapter_size", corrupt("tree.parts.residency.adapter_size", 0)),
    ("I2", "invalid_kv_size", corrupt("tree.parts.residency.invalid_kv_size", 2)),
    ("I3", "belongs to node", corrupt("c.host_payload", (102, 101))),
    ("I1", "above it is not", lambda w: (corrupt("a.resident", False)(w), corrupt("a.payload", None)(w))[0]),
    ("I1", "whole pages", corrupt("lower.size", 3)),
    ("I1", "whole pages", corrupt("lower.tokens", lambda tokens: tokens[:1])),
    ("I1", "another key than its tokens", corrupt("lower.tokens", array("q", [9, 9]))),
    ("I4", "negative", corrupt("b.locks", -1)),
    ("I4", "fewer locks than its children", corrupt("upper.locks", 0)),
    ("I2", "evictable_size", corrupt("tree.parts.residency.evictable_size", lambda size: size + 1)),
    ("I2", "protected_size", corrupt("tree.parts.residency.protected_size", lambda size: size - 1)),
    ("I2", "evictable_size", corrupt("b.pinned", True)),
    ("I2", "pinned_size", corrupt("tree.parts.locks.pinned_size", 7)),
    ("I2", "uncollected victims", lose_an_orphan),
    ("I2", "number of KV nodes", corrupt("tree.parts.structure.kv_count", 0)),
    ("candidates", "believes it is queued", lose_an_entry),
    ("candidates", "could be evicted, but has no entry", forget_to_queue),
    ("candidates", "above", queue_too_high),
    ("candidates", "at most", flood_the_heap),
    ("I3", "belongs to node", one_slot_two_owners),
    ("I3", "belongs to node", corrupt("b.payload", (2, 3, 4, 4))),
    ("I3", "its payload 3", corrupt("b.payload", (2, 3, 4))),
]


@pytest.mark.parametrize(("rule", "text", "plant"), CORRUPTIONS)
def test_a_planted_corruption_trips_its_rule(rule: str, text: str, plant: Callable[[World], None]) -> None:
    world = build()
    plant(world)
    with pytest.raises(InvariantError, match=rf"^{rule}: .*{text}"):
        check(world)


def test_every_clause_of_check_is_tripped() -> None:
    """A clause added to checks.py without a planted fault fails here."""
    tripped = set()
    for _, _, plant in CORRUPTIONS:
        world = build()
        plant(world)
        with pytest.raises(InvariantError) as caught:
            check(world)
        # The last frame is _fail itself, the one before it the clause.
        tripped.add(traceback.extract_tb(caught.value.__traceback__)[-2].lineno)
    lines = Path(checks.__file__).read_text().splitlines()
    clauses = {number for number, line in enumerate(lines, 1) if line.lstrip().startswith("_fail(")}
    assert clauses == tripped
