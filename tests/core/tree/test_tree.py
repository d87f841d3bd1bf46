"""The dependency tree, call by call."""

from __future__ import annotations

from array import array

import pytest

from elora_sglang.core.policies import create_policy
from elora_sglang.core.tree.structure import shared_prefix
from elora_sglang.core.tree.tree import DependencyTree, InvariantError, Node
from elora_sglang.eval.interleavings.memory import TuplePayloads


def tokens(*values: int) -> array[int]:
    return array("q", values)


def make(page_size: int = 1) -> DependencyTree:
    return DependencyTree(page_size, create_policy("lru"), TuplePayloads())


def resident(tree: DependencyTree, key: str, slots: range, *, pinned: bool = False) -> Node:
    node = tree.register_adapter(key, len(slots), pinned=pinned)
    tree.make_resident(node, tuple(slots))
    return node


def slots_of(tree: DependencyTree, node: Node) -> list[int]:
    return [slot for part in tree.path(node) for slot in part.payload]


def sizes(tree: DependencyTree) -> tuple[int, int]:
    tree.check(lambda payload: payload)
    return tree.evictable_size, tree.protected_size


def test_a_miss_returns_the_adapter_never_the_root() -> None:
    tree = make(4)
    a = resident(tree, "a", range(2))
    for key in (tokens(), tokens(1, 2), tokens(1, 2, 3, 4, 5)):
        assert tree.match(a, key)[:2] == (a, 0)
        assert tree.match(tree.base, key)[:2] == (tree.base, 0)


def test_a_match_that_ends_inside_a_node_splits_it() -> None:
    tree = make()
    whole = tree.insert(tree.base, tokens(1, 2, 3, 4, 5), None, (10, 11, 12, 13, 14), 5).node
    got = tree.match(tree.base, tokens(1, 2, 3, 9, 9))
    assert got.length == 3 and slots_of(tree, got.node) == [10, 11, 12]
    assert slots_of(tree, whole) == [10, 11, 12, 13, 14]  # the old handle still ends where it ended
    assert whole.parent is got.node and sizes(tree) == (5, 0)


def test_matches_and_splits_are_whole_pages() -> None:
    tree = make(4)
    key = tokens(*range(8), 90, 91)
    assert tree.insert(tree.base, key, None, tuple(range(10)), 10).matched == 0
    assert tree.evictable_size == 8
    got = tree.match(tree.base, tokens(0, 1, 2, 3, 4, 5, 70, 71))
    assert got.length == 4 and got.node.size == 4
    assert tree.match(tree.base, tokens(*range(8)), limit=7).length == 4
    assert tree.match(tree.base, tokens(0, 1, 2, 77))[:2] == (tree.base, 0)


def test_insert_keeps_only_what_was_missing() -> None:
    tree = make()
    tree.insert(tree.base, tokens(1, 2, 3), None, (10, 11, 12), 3)
    got = tree.insert(tree.base, tokens(1, 2, 3, 4), None, (20, 21, 22, 23), 4)
    assert got.matched == 3 and slots_of(tree, got.node) == [10, 11, 12, 23]
    again = tree.insert(tree.base, tokens(1, 2), None, (30, 31), 2)
    assert again.matched == 2 and again.node.size == 2 and sizes(tree) == (4, 0)


def test_namespaces_and_adapters_share_nothing() -> None:
    tree = make()
    a, b = resident(tree, "a", range(100, 102)), resident(tree, "b", range(102, 105))
    key = tokens(1, 2, 3)
    tree.insert(a, key, "tenant", (10, 11, 12), 3)
    assert tree.match(a, key, "tenant").length == 3
    for adapter, namespace in (
        (a, None),
        (a, "other"),
        (a, ("tenant",)),
        (b, "tenant"),
        (tree.base, "tenant"),
    ):
        assert tree.match(adapter, key, namespace)[:2] == (adapter, 0)


def test_a_lock_pins_the_adapter_and_what_lies_between() -> None:
    tree = make()
    a = resident(tree, "a", range(100, 104))
    tree.insert(a, tokens(1, 2, 3, 4), None, (10, 11, 12, 13), 4)
    node = tree.match(a, tokens(1, 2)).node
    tree.lock(node)
    assert sizes(tree) == (2, 6)
    assert [v.payload for v in tree.evict(100)] == [(12, 13)]
    assert tree.evict(1) == [] and sizes(tree) == (0, 6)
    tree.unlock(node)
    assert [(v.kind, v.key, v.payload) for v in tree.evict(3)] == [
        ("kv", 1, (10, 11)),
        ("adapter", "a", (100, 101, 102, 103)),
    ]
    assert not a.resident and tree.adapter("a") is a and sizes(tree) == (0, 0)


def test_a_split_inherits_the_locks_of_what_it_splits() -> None:
    tree = make()
    deep = tree.insert(tree.base, tokens(1, 2, 3, 4), None, (10, 11, 12, 13), 4).node
    tree.lock(deep)
    upper = tree.match(tree.base, tokens(1, 2, 9)).node
    assert upper.locks == 1 and sizes(tree) == (0, 4)
    tree.lock(upper)
    tree.unlock(deep)
    assert sizes(tree) == (2, 2)
    tree.unlock(upper)
    assert sizes(tree) == (4, 0)


def test_eviction_takes_the_least_recently_used_leaf_first() -> None:
    tree = make()
    for first in (1, 2, 3):
        tree.insert(tree.base, tokens(first, 0), None, (first * 10, first * 10 + 1), 2)
    tree.match(tree.base, tokens(1, 0))
    tree.find(tree.base, tokens(2, 0))  # looking is not using
    assert [victim.key for victim in tree.evict(3)] == [2, 3]


def test_a_pinned_adapter_is_protected_until_it_is_unpinned() -> None:
    tree = make()
    a = resident(tree, "a", range(5), pinned=True)
    assert sizes(tree) == (0, 5) and tree.evict(1) == []
    assert tree.parts.locks.pinned_size == 5
    assert tree.register_adapter("a", 5, pinned=False) is a
    assert sizes(tree) == (5, 0) and tree.parts.locks.pinned_size == 0
    assert [victim.key for victim in tree.evict(1)] == ["a"]


def test_a_lock_on_an_adapter_that_is_not_resident_counts_from_its_load() -> None:
    tree = make()
    a = tree.register_adapter("a", 3)
    tree.lock(a)
    assert sizes(tree) == (0, 0)
    tree.make_resident(a, (1, 2, 3))
    assert sizes(tree) == (0, 3)
    tree.unlock(a)
    assert sizes(tree) == (3, 0)


def test_unload_frees_the_idle_part_now_and_the_rest_with_the_last_lock() -> None:
    tree = make()
    a = resident(tree, "a", range(100, 103))
    tree.insert(a, tokens(1, 2, 3), None, (10, 11, 12), 3)
    running = tree.match(a, tokens(1, 2)).node
    tree.lock(running)
    tree.lock(running)
    dropped = tree.drop_branch(a)
    assert [victim.payload for victim in dropped.victims] == [(12,)] and dropped.locked_size == 5
    assert tree.adapter("a") is None and tree.has_doomed("a") and tree.is_doomed(running)
    assert list(tree.kv_nodes()) == [running] and sizes(tree) == (0, 5)

    fresh = resident(tree, "a", range(200, 203))  # the name is free at once, as another node
    assert fresh is not a and tree.match(fresh, tokens(1, 2))[:2] == (fresh, 0)
    for call in (lambda: tree.match(a, tokens(1)), lambda: tree.insert(a, tokens(1), None, (1,), 1)):
        with pytest.raises(InvariantError, match="unloaded"):
            call()

    tree.unlock(running)
    assert tree.collect_doomed() == []
    tree.unlock(running)
    assert sizes(tree) == (8, 0) and tree.has_doomed("a")
    assert [victim.payload for victim in tree.collect_doomed()] == [(10, 11), (100, 101, 102)]
    assert sizes(tree) == (3, 0) and not tree.has_doomed("a")
    with pytest.raises(InvariantError, match="left the tree"):
        tree.lock(running)


def test_what_an_unload_freed_late_is_evicted_first() -> None:
    tree = make()
    a = resident(tree, "a", range(100, 103))
    tree.insert(tree.base, tokens(7), None, (50,), 1)
    tree.lock(a)
    tree.drop_branch(a)
    tree.unlock(a)
    assert tree.evictable_size == 4
    assert [victim.payload for victim in tree.evict(2)] == [(100, 101, 102)]
    assert sizes(tree) == (1, 0)


def test_unloading_twice_or_without_residency_frees_nothing() -> None:
    tree = make()
    idle = tree.register_adapter("idle", 4)
    assert tree.drop_branch(idle) == ([], 0, []) and tree.drop_branch(idle) == ([], 0, [])
    assert not tree.has_doomed("idle")
    locked = resident(tree, "locked", range(4))
    tree.lock(locked)
    assert tree.drop_branch(locked) == ([], 4, []) and tree.drop_branch(locked) == ([], 4, [])


def test_split_at_lets_the_answer_leave_without_the_prompt() -> None:
    tree = make(2)
    tree.insert(tree.base, tokens(1, 2, 3, 4, 5, 6), None, tuple(range(6)), 6)
    assert tree.split_at(tree.base, tokens(1, 2, 3, 4, 5, 6), None, 4).size == 4
    assert [victim.payload for victim in tree.evict(1)] == [(4, 5)]
    with pytest.raises(InvariantError, match="not all in memory"):
        tree.split_at(tree.base, tokens(1, 2, 3, 4, 5, 6), None, 6)


def test_reset_keeps_the_base_node_and_voids_all_others() -> None:
    tree = make()
    base = tree.base
    a = resident(tree, "a", range(3))
    node = tree.insert(a, tokens(1), None, (9,), 1).node
    tree.lock(node)
    tree.reset()
    assert tree.base is base and tree.adapters() == [base] and sizes(tree) == (0, 0) and tree.nodes == 1
    assert len(tree.parts.order.kv) == 0 and tree.evict(100) == []
    with pytest.raises(InvariantError):
        tree.unlock(node)
    resident(tree, "a", range(7))  # even with another size


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, a: t.insert(t.register_adapter("n", 1), tokens(1), None, (1,), 1), "not resident"),
        (lambda t, a: t.make_resident(a, (1, 2)), "resident already"),
        (lambda t, a: t.register_adapter("a", 3), "registered with 2 slots, not 3"),
        (lambda t, a: t.register_adapter("b", -1), "-1 slots"),
        (lambda t, a: t.unlock(a), "not locked"),
        (lambda t, a: t.lock(t.root), "cannot be locked"),
        (lambda t, a: t.drop_branch(t.base), "cannot be unloaded"),
        (lambda t, a: t.match(t.root, tokens(1)), "not an adapter"),
    ],
)
def test_what_must_not_happen_is_refused_and_changes_nothing(call: object, message: str) -> None:
    tree = make()
    a = resident(tree, "a", range(2))
    before = (tree.evictable_size, tree.protected_size)
    with pytest.raises(InvariantError, match=message):
        call(tree, a)  # type: ignore[operator]
    assert sizes(tree) == before


@pytest.mark.parametrize("key", [[1, 2], array("i", [1, 2]), (1, 2)])
def test_keys_of_another_type_are_refused_rather_than_never_found(key: object) -> None:
    with pytest.raises(TypeError, match='typecode "q"'):
        make().match(make().base, key)  # type: ignore[arg-type]


@pytest.mark.parametrize("page", [1, 16, 48])
def test_shared_prefix_finds_every_first_difference(page: int) -> None:
    edge = array("q", range(400))
    for limit in (0, 1, 15, 16, 17, 48, 64, 65, 200, 400):
        for at in range(limit):
            other = array("q", [7, 7, *edge])
            other[2 + at] = -1
            assert shared_prefix(edge, other, 2, limit, page) == at // page * page
        assert shared_prefix(edge, array("q", [7, 7, *edge]), 2, limit, page) == limit // page * page


def test_old_heap_entries_never_outnumber_the_nodes() -> None:
    tree = make()
    for round in range(40):
        a = resident(tree, f"a{round}", range(2))
        for first in range(100):
            tree.insert(a, tokens(first), None, (first,), 1)
        tree.drop_branch(a)
        tree.check()
    assert tree.nodes == 1 and len(tree.parts.order.kv) <= 66


def test_render_shows_every_node() -> None:
    tree = make()
    a = resident(tree, "sql", range(2))
    tree.insert(a, tokens(5, 6), None, (3, 4), 2)
    shown = tree.render()
    assert "'sql' size=2" in shown and "[5, 6]" in shown and len(shown.splitlines()) == 4


def test_a_candidate_heap_gone_wrong_cannot_evict_what_is_locked() -> None:
    tree = make()
    node = tree.insert(tree.base, tokens(1, 2), None, (3, 4), 2).node
    tree.lock(node)
    with pytest.raises(InvariantError, match="in use"):
        tree.parts.residency.give_up_device(node)
    assert sizes(tree) == (0, 2)
