"""``check()`` must trip: one planted corruption per rule."""

from __future__ import annotations

import traceback
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tree_driver import TuplePayloads

from elora_sglang.core import checks
from elora_sglang.core.policy import create_policy
from elora_sglang.core.tree import DependencyTree, InvariantError, Node, Victim


@dataclass
class World:
    """root → a (locked) → upper → lower (locked); root → b; pages of two tokens."""

    tree: DependencyTree
    a: Node
    b: Node
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
    return World(tree, a, b, upper, lower)


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
    world.upper.parent = world.tree.root
    world.tree.root.children[world.upper.key] = world.upper


def move_to_another_adapter(world: World) -> None:
    del world.a.children[world.upper.key]
    world.upper.parent = world.b
    world.b.children[world.upper.key] = world.upper


def second_root(world: World) -> None:
    world.upper.kind = "root"


def doom_without_locks(world: World) -> None:
    world.tree.drop_branch(world.a)
    for node in (world.a, world.upper, world.lower):
        node.locks = 0


def lose_an_entry(world: World) -> None:
    world.tree._candidates._heap.clear()


def forget_to_queue(world: World) -> None:
    for node in world.tree.walk():
        node.queued = None


def queue_too_high(world: World) -> None:
    leaf = next(iter(world.b.children.values()))
    leaf.queued = 10.0**6
    world.tree._candidates._heap.append((leaf.queued, leaf.id, leaf))


def flood_the_heap(world: World) -> None:
    world.tree._candidates._heap.extend([(-1.0, 0, world.a)] * 200)


def one_slot_two_owners(world: World) -> None:
    world.b.payload = (2, 3, 4, 8)


def lose_an_orphan(world: World) -> None:
    world.tree._orphans.append(Victim(99, "kv", 1, (50, 51), 2))


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
    ("I1", "doomed and unlocked", doom_without_locks),
    ("I1", "has the payload", corrupt("b.payload", None)),
    ("I1", "not resident", corrupt("lower.resident", False)),
    ("I1", "not resident", corrupt("lower.payload", None)),
    ("I1", "above it is not", lambda w: (corrupt("a.resident", False)(w), corrupt("a.payload", None)(w))[0]),
    ("I1", "whole pages", corrupt("lower.size", 3)),
    ("I1", "whole pages", corrupt("lower.tokens", lambda tokens: tokens[:1])),
    ("I1", "another key than its tokens", corrupt("lower.tokens", array("q", [9, 9]))),
    ("I4", "negative", corrupt("b.locks", -1)),
    ("I4", "fewer locks than its children", corrupt("upper.locks", 0)),
    ("I2", "evictable_size", corrupt("tree.evictable_size", lambda size: size + 1)),
    ("I2", "protected_size", corrupt("tree.protected_size", lambda size: size - 1)),
    ("I2", "evictable_size", corrupt("b.pinned", True)),
    ("I2", "pinned_size", corrupt("tree._pinned_size", 7)),
    ("I2", "uncollected victims", lose_an_orphan),
    ("I2", "number of KV nodes", corrupt("tree._kv_count", 0)),
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
