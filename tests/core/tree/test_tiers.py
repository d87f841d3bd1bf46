"""Two tiers: what eviction, copies in flight, guards and failures do to the tree, and to the bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.two_tier_life import Independent, tokens

from elora_sglang.core.policies import create_policy
from elora_sglang.core.policies.base import Policy
from elora_sglang.core.tree.tree import DependencyTree, InvariantError, Node, Transfer
from elora_sglang.eval.interleavings.memory import TuplePayloads


class Small:
    """Adapter a (2 slots, complete on the host and resident) with KV 1 2 | 3 4 below it, all dirty."""

    def __init__(self, policy: Policy | None = None) -> None:
        self.tree = DependencyTree(1, policy or create_policy("lru"), TuplePayloads())
        self.a = self.tree.register_adapter("a", 2)
        self.tree.place_on_host(self.a, (100, 101))
        self.tree.make_resident(self.a, (0, 1))
        self.lower = self.tree.insert(self.a, tokens(1, 2, 3, 4), None, (10, 11, 12, 13)).node
        self.upper = self.tree.split_at(self.a, tokens(1, 2, 3, 4), None, 2)

    def save(self, node: Node, *slots: tuple[int, ...]) -> Transfer:
        transfer = self.tree.begin_save(node)
        for one, payload in zip(transfer.nodes, slots, strict=True):
            self.tree.set_host_payload(one, payload)
        return transfer

    def check(self) -> None:
        self.tree.check(lambda payload: payload)


@pytest.fixture
def small() -> Small:
    return Small()


def test_a_dirty_leaf_is_dropped_and_a_clean_one_stays_on_the_host(small: Small) -> None:
    tree = small.tree
    small_save = small.save(small.upper, (102, 103))
    tree.end_transfer(small_save.id)
    fates = [(v.node_id, v.fate, v.size) for v in tree.evict(4)]
    assert fates == [(small.lower.id, "dropped", 2), (small.upper.id, "demoted", 2)]
    assert (tree.host_size, tree.counts()["kv"]) == (4, 1)
    match = tree.match(small.a, tokens(1, 2, 3, 4))
    assert match == (small.a, 0, small.upper, 2)
    small.check()


def test_a_copy_in_flight_holds_its_nodes_and_serves_no_match_before_it_ends(small: Small) -> None:
    transfer = small.save(small.lower, (102, 103), (104, 105))
    assert transfer.nodes == [small.upper, small.lower]
    assert (small.tree.evictable_size, small.tree.protected_size) == (0, 6)
    assert small.tree.evict(6) == [] and small.tree.evict_host(6) == []
    small.check()
    small.tree.end_transfer(transfer.id)
    assert [v.fate for v in small.tree.evict(99)] == ["demoted"] * 3
    small.check()


def test_a_saved_victim_is_on_the_host_when_its_copy_has_arrived(small: Small) -> None:
    tree = small.tree
    tree.end_transfer(small.save(small.upper, (102, 103)).id)
    (victim,) = tree.evict(1, save=lambda node: True)
    assert (victim.fate, victim.payload) == ("saved", (12, 13)) and victim.transfer is not None
    tree.set_host_payload(small.lower, (104, 105))
    assert tree.match(small.a, tokens(1, 2, 3, 4))[1:] == (2, small.upper, 0)  # still under way
    assert tree.evict_host(99) == []  # nothing above it may lose its copy now
    small.check()
    tree.end_transfer(victim.transfer)
    assert tree.match(small.a, tokens(1, 2, 3, 4)) == (small.upper, 2, small.lower, 2)
    small.check()


def test_a_load_brings_back_the_whole_path_adapter_first(small: Small) -> None:
    tree = small.tree
    tree.end_transfer(small.save(small.lower, (102, 103), (104, 105)).id)
    tree.evict(99)
    load = tree.begin_load(small.lower)
    assert load.nodes == [small.a, small.upper, small.lower] and load.size == 6
    for node, payload in zip(load.nodes, ((20, 21), (22, 23), (24, 25)), strict=True):
        tree.set_payload(node, payload)
    assert (tree.evictable_size, tree.protected_size) == (0, 6) and tree.evict_host(9) == []
    assert tree.match(small.a, tokens(1, 2, 3, 4)).length == 4  # a load under way counts as there
    small.check()
    tree.end_transfer(load.id)
    assert (tree.evictable_size, tree.protected_size) == (6, 0)
    small.check()


def test_a_failed_load_leaves_everything_on_the_host(small: Small) -> None:
    tree = small.tree
    tree.end_transfer(small.save(small.lower, (102, 103), (104, 105)).id)
    tree.evict(99)
    load = tree.begin_load(small.lower)
    ended = tree.end_transfer(load.id, ok=False)
    assert [v.payload for v in ended.victims] == [None] * 3 and tree.evictable_size == 0
    assert tree.match(small.a, tokens(1, 2, 3, 4)) == (small.a, 0, small.lower, 4)
    small.check()


def test_a_failed_load_that_is_in_use_stops_the_server(small: Small) -> None:
    tree = small.tree
    tree.end_transfer(small.save(small.lower, (102, 103), (104, 105)).id)
    tree.evict(99)
    load = tree.begin_load(small.lower)
    tree.lock(small.lower)
    with pytest.raises(InvariantError, match="came into use"):
        tree.end_transfer(load.id, ok=False)


def test_a_failed_save_of_a_victim_takes_it_out_of_the_tree(small: Small) -> None:
    tree = small.tree
    tree.end_transfer(small.save(small.upper, (102, 103)).id)
    (victim,) = tree.evict(1, save=lambda node: True)
    assert victim.transfer is not None
    ended = tree.end_transfer(victim.transfer, ok=False)
    assert [(v.node_id, v.gone) for v in ended.host_victims] == [(small.lower.id, True)]
    assert tree.match(small.a, tokens(1, 2, 3, 4)) == (small.upper, 2, small.upper, 0)
    small.check()


def test_an_adapter_is_never_saved_from_the_device(small: Small) -> None:
    small.tree.evict_host(99)
    for node in (small.a, small.lower):  # it, or KV that would take it along
        with pytest.raises(InvariantError, match="cannot be saved"):
            small.tree.begin_save(node)
    assert small.tree.evict(1, save=lambda node: True)[0].fate == "dropped"
    small.check()


def test_host_eviction_makes_dirty_or_takes_away(small: Small) -> None:
    tree = small.tree
    tree.end_transfer(small.save(small.lower, (102, 103), (104, 105)).id)
    tree.evict(2)  # the lower part is on the host only
    victims = tree.evict_host(99)
    assert [(v.node_id, v.gone) for v in victims] == [
        (small.lower.id, True),
        (small.upper.id, False),
        (small.a.id, False),
    ]
    assert tree.host_size == 0 and [v.fate for v in tree.evict(99)] == ["dropped", "dropped"]
    assert not small.a.host and tree.adapter("a") is small.a
    read = tree.begin_read(small.a)
    tree.set_host_payload(small.a, (100, 101))
    tree.end_transfer(read.id)
    assert small.a.clean
    small.check()


def test_recomputed_kv_gives_its_slots_to_what_only_the_host_had(small: Small) -> None:
    tree = small.tree
    tree.end_transfer(small.save(small.lower, (102, 103), (104, 105)).id)
    tree.evict(2)
    inserted = tree.insert(small.a, tokens(1, 2, 3, 4, 5), None, (30, 31, 32, 33, 34))
    assert inserted.matched == 2 and small.lower.payload == (32, 33) and small.lower.clean
    small.check()


def test_guarded_nodes_leave_last_and_late_requests_first(small: Small) -> None:
    tree = small.tree
    nodes = [tree.insert(small.a, tokens(50 + i), None, (40 + i,)).node for i in range(4)]
    tree.guard(nodes[0], 1)
    tree.guard(nodes[1], 2)
    keys = [victim.key for victim in tree.evict(99)]
    assert keys == [3, 1, 52, 53, 51, 50, "a"]
    small.check()


def test_a_released_guard_puts_the_node_back_into_the_order(small: Small) -> None:
    tree = small.tree
    tree.guard(small.lower, 3)
    other = tree.insert(small.a, tokens(50), None, (40,)).node
    tree.unguard(3)
    assert [v.node_id for v in tree.evict(5)] == [small.lower.id, small.upper.id, other.id]
    small.check()


def test_without_the_dependency_kv_outlives_its_adapter_and_is_counted_invalid() -> None:
    tree = DependencyTree(1, Independent(), TuplePayloads())
    a = tree.register_adapter("a", 2)
    tree.make_resident(a, (0, 1))
    tree.insert(a, tokens(1, 2, 3), None, (2, 3, 4))
    assert [v.kind for v in tree.evict(2)] == ["adapter"] and tree.invalid_kv_size == 3
    tree.check(lambda payload: payload)
    tree.make_resident(a, (0, 1))
    assert tree.invalid_kv_size == 0
    tree.check(lambda payload: payload)


class Outlived(Small):
    """As :class:`Small` without the dependency: the adapter is on the host only, its KV 1 2 | 3 4 on the device."""

    def __init__(self) -> None:
        super().__init__(Independent())
        assert [victim.kind for victim in self.tree.evict(1)] == ["adapter"]


def test_the_load_of_an_adapter_that_its_kv_outlived_may_fail() -> None:
    small = Outlived()
    load = small.tree.begin_load(small.a)
    small.tree.split_at(small.a, tokens(1, 2), None, 1)  # its child has another id from now on
    assert not small.tree.parts.transfers.in_use(load.id)
    small.tree.end_transfer(load.id, ok=False)
    assert not small.a.resident and small.tree.invalid_kv_size == 4
    small.check()


def test_the_load_of_an_adapter_whose_kv_is_being_saved_may_fail() -> None:
    small = Outlived()
    save = small.save(small.upper, (102, 103))
    load = small.tree.begin_load(small.a)
    assert not small.tree.parts.transfers.in_use(load.id)
    small.tree.end_transfer(load.id, ok=False)
    small.check()
    small.tree.end_transfer(save.id)
    assert small.tree.protected_size == 0
    small.check()


@pytest.mark.parametrize("how", ["lock", "insert", "insert again"])
def test_what_came_to_build_on_an_outlived_adapters_load_is_told_from_what_was_there(how: str) -> None:
    small = Outlived()
    save = small.save(small.upper, (102, 103))
    load = small.tree.begin_load(small.a)
    if how == "lock":
        small.tree.lock(small.lower)
    else:
        new = tokens(9) if how == "insert" else tokens(1, 2, 3, 4)
        small.tree.end_transfer(save.id)
        small.tree.evict(2 if how == "insert" else 4)  # the tail, or all: "again" computes what the host has
        small.tree.insert(small.a, new, None, tuple(range(50, 50 + len(new))))
    assert small.tree.parts.transfers.in_use(load.id)
    with pytest.raises(InvariantError, match="came into use"):
        small.tree.end_transfer(load.id, ok=False)


@pytest.mark.parametrize("policy", [lambda: create_policy("lru"), Independent], ids=["lru", "independent"])
def test_what_the_last_lock_of_a_doomed_branch_frees_may_leave_though_a_copy_holds_the_branch(
    policy: Callable[[], Policy],
) -> None:
    small = Small(policy())
    tree = small.tree
    tree.end_transfer(small.save(small.upper, (102, 103)).id)
    tree.lock(small.a)
    (saved,) = tree.evict(1, save=lambda node: True)  # the copy of the lower part stays in flight
    tree.set_host_payload(small.lower, (104, 105))
    tree.evict(1)  # the upper part, which is on the host only now
    tree.lock(small.upper)
    tree.unlock(small.a)
    assert tree.evict(1) == []  # the adapter's entry among the candidates goes: it is locked
    assert tree.drop_branch(small.a).locked_size == 2
    tree.unlock(small.upper)  # the copy holds upper and lower; the adapter's device slots are held by nothing
    assert tree.evictable_size == 2
    small.check()
    assert [victim.node_id for victim in tree.evict(2)] == [small.a.id]
    assert saved.transfer is not None
    tree.end_transfer(saved.transfer)
    assert not tree.has_doomed("a")
    small.check()


def test_a_failed_load_of_a_pinned_adapter_keeps_the_sizes_right(small: Small) -> None:
    small.tree.evict(99)
    small.tree.set_pinned(small.a, True)
    load = small.tree.begin_load(small.a)
    assert small.tree.protected_size == 2
    small.tree.end_transfer(load.id, ok=False)
    assert (small.tree.evictable_size, small.tree.protected_size) == (0, 0)
    small.check()
