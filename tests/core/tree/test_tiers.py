"""Two tiers: what eviction, copies in flight, guards and failures do to the tree, and to the bytes."""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Callable
from functools import partial

import pytest
from support.tree_driver import TuplePayloads

from elora_sglang.core.policies import create_policy
from elora_sglang.core.policies.base import BasePolicy, Policy
from elora_sglang.core.tree.node import Kind
from elora_sglang.core.tree.tree import DependencyTree, HostVictim, InvariantError, Node, Transfer, Victim

SEED = int(os.environ.get("ELORA_TREE_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)


def tokens(*values: int) -> array[int]:
    return array("q", values)


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


class Independent(BasePolicy):
    """LRU without the dependency; adapters first."""

    dependency = False

    def priority(self, node: Node) -> float:
        return node.last_tick

    def side(self, need: Kind, used_by_adapters: int) -> Kind | None:
        return "adapter"


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
    assert not small.tree.in_use(load.id)
    small.tree.end_transfer(load.id, ok=False)
    assert not small.a.resident and small.tree.invalid_kv_size == 4
    small.check()


def test_the_load_of_an_adapter_whose_kv_is_being_saved_may_fail() -> None:
    small = Outlived()
    save = small.save(small.upper, (102, 103))
    load = small.tree.begin_load(small.a)
    assert not small.tree.in_use(load.id)
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
    assert small.tree.in_use(load.id)
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


class Memory:
    """Plays both pools, with bytes: what a slot holds is the token prefix (or adapter) that was written there."""

    def __init__(self, rng: random.Random, page: int, device: int, host: int, policy: Policy) -> None:
        self.rng, self.page, self.sizes = rng, page, (device, host)
        self.tree = DependencyTree(page, policy, TuplePayloads())
        self.free = list(range(device))
        self.host_free = list(range(1000, 1000 + host))
        self.bytes: dict[int, object] = {}
        self.held: list[Node] = []
        self.copies: dict[int, Callable[[], None]] = {}
        self.counts = dict.fromkeys(
            ("demoted", "dropped", "saved", "load", "save", "read", "failed", "host"), 0
        )
        for name in "abc":
            self.tree.register_adapter(name, page * (1 + "abc".index(name)))

    def receive(self, victims: list[Victim]) -> None:
        for victim in victims:
            self.counts[victim.fate] += 1
            if victim.fate == "saved":
                assert victim.transfer is not None
                (node,) = self.tree.transfers[victim.transfer].nodes
                target = tuple(self.host_free.pop() for _ in range(victim.size))
                self.tree.set_host_payload(node, target)
                # Read before the slots are used again, which is what a fence is for; it arrives later.
                kept = dict(zip(target, [self.bytes[slot] for slot in victim.payload], strict=True))
                self.copies[victim.transfer] = partial(self.bytes.update, kept)
            self.free.extend(victim.payload or ())

    def receive_host(self, victims: list[HostVictim]) -> None:
        for victim in victims:
            self.counts["host"] += 1
            self.host_free.extend(victim.payload or ())

    def room(self, need: int) -> bool:
        if need > len(self.free):
            left = len(self.host_free)

            def save(node: Node) -> bool:
                nonlocal left
                wanted = self.rng.random() < 0.5 and node.size <= left
                left -= node.size if wanted else 0
                return wanted

            self.receive(self.tree.evict(need - len(self.free), save=save))
        return need <= len(self.free)

    def take(self, need: int) -> tuple[int, ...]:
        taken, self.free = tuple(self.free[:need]), self.free[need:]
        return taken

    def bring(self, adapter: Node) -> bool:
        if adapter.resident:
            return True
        if adapter.clean:
            self.load(adapter)
        elif not adapter.host and self.room(adapter.size):
            slots = self.take(adapter.size)
            self.bytes.update((slot, (adapter.key, i)) for i, slot in enumerate(slots))
            self.tree.make_resident(adapter, slots)
        return adapter.resident

    def load(self, node: Node) -> None:
        tree, missing = self.tree, self.tree.missing(node)
        if not missing or not all(one.clean for one in missing):
            return None
        tree.lock(node)  # so that making room does not take what is to be loaded
        if self.room(sum(one.size for one in missing)):
            transfer = tree.begin_load(node)
            self.counts["load"] += 1
            if self.rng.random() < 0.1:  # cannot be started; nobody but us can have used it
                tree.unlock(node)
                self.copies[transfer.id] = lambda: None
                assert not tree.in_use(transfer.id)
                return self.finish(transfer.id, False)
            for one in transfer.nodes:
                tree.set_payload(one, self.take(one.size))
            moves = [(one.host_payload, one.payload) for one in transfer.nodes]
            self.start(transfer, moves)
        tree.unlock(node)
        return self.receive(tree.collect_doomed())

    def start(self, transfer: Transfer, moves: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        def copy() -> None:
            for source, target in moves:
                self.bytes.update(zip(target, [self.bytes[slot] for slot in source], strict=True))

        self.copies[transfer.id] = copy

    def finish(self, id: int, ok: bool) -> None:
        transfer = self.tree.transfers[id]
        copy = self.copies.pop(id)
        if transfer.kind == "load" and self.tree.in_use(id):
            ok = True
        if ok:
            copy()
        else:
            self.counts["failed"] += 1
        ended = self.tree.end_transfer(id, ok)
        self.receive(ended.victims)
        self.receive_host(ended.host_victims)
        self.receive(self.tree.collect_doomed())
        self.receive_host(self.tree.collect_doomed_host())

    def settle(self, node: Node) -> None:
        """What a fence does: wait for the copies that bring bytes to the path of ``node``."""
        for one in [self.tree.adapter_of(node), *self.tree.path(node)]:
            while one.transfer in self.copies and self.tree.transfers[one.transfer].kind == "load":  # type: ignore[index]
                self.finish(one.transfer, True)  # type: ignore[arg-type]

    def step(self) -> None:
        rng, tree = self.rng, self.tree
        adapter = rng.choice(tree.adapters())
        prompt = tuple(rng.randrange(3) for _ in range(self.page * rng.randrange(1, 9)))
        action = rng.choices(
            (
                "insert",
                "lock",
                "unlock",
                "load",
                "save",
                "read",
                "host",
                "end",
                "evict",
                "guard",
                "pin",
                "drop",
            ),
            (30, 12, 14, 16, 12, 4, 5, 20, 4, 4, 1, 1),
        )[0]
        if action == "insert" and self.bring(adapter):
            tree.lock(adapter)
            if self.room(len(prompt)):
                slots = self.take(len(prompt))
                for i, slot in enumerate(slots):
                    self.bytes[slot] = (adapter.key, prompt[: i + 1])
                got = tree.insert(adapter, tokens(*prompt), None, slots)
                self.free.extend(slots[: got.matched])
            tree.unlock(adapter)
        elif action == "lock" and len(self.held) < 5 and adapter.resident:
            match = tree.match(adapter, tokens(*prompt))
            self.settle(match.node)
            tree.lock(match.node)
            self.held.append(match.node)
            self.verify(adapter, match.node, prompt[: match.length], host=False)
        elif action == "unlock" and self.held:
            tree.unlock(self.held.pop(rng.randrange(len(self.held))))
        elif action == "load":
            match = tree.match(adapter, tokens(*prompt))
            self.verify(adapter, match.host_node, prompt[: match.length + match.host_length], host=True)
            self.load(match.host_node)
        elif action == "save":
            node = tree.match(adapter, tokens(*prompt)).node
            path = [adapter, *tree.path(node)]
            dirty = [one for one in path if not one.host]
            if (
                dirty
                and dirty[0].kind == "kv"
                and all(one.transfer is None for one in dirty)
                and path[path.index(dirty[0]) - 1].clean
                and sum(one.size for one in dirty) <= len(self.host_free)
            ):
                transfer = tree.begin_save(node)
                self.counts["save"] += 1
                for one in transfer.nodes:
                    tree.set_host_payload(one, tuple(self.host_free.pop() for _ in range(one.size)))
                self.start(transfer, [(one.payload, one.host_payload) for one in transfer.nodes])
        elif action == "read" and not adapter.host and adapter.size <= len(self.host_free):
            transfer = tree.begin_read(adapter)
            self.counts["read"] += 1
            slots = tuple(self.host_free.pop() for _ in range(adapter.size))
            tree.set_host_payload(adapter, slots)
            filled = {slot: (adapter.key, i) for i, slot in enumerate(slots)}
            self.copies[transfer.id] = lambda: self.bytes.update(filled)
        elif action == "host":
            self.receive_host(tree.evict_host(rng.randrange(1, 12 * self.page)))
        elif action == "end" and self.copies:
            self.finish(rng.choice(list(self.copies)), rng.random() < 0.9)
        elif action == "evict":
            self.room(rng.randrange(1, 30 * self.page))
        elif action == "guard":
            rank = rng.randrange(1, 5)
            tree.unguard(rank)
            tree.guard(tree.match(adapter, tokens(*prompt)).host_node, rank)
        elif action == "pin" and adapter.key is not None:
            tree.set_pinned(adapter, rng.random() < 0.3)
        elif action == "drop" and adapter.key is not None:
            dropped = tree.drop_branch(adapter)
            self.receive(dropped.victims)
            self.receive_host(dropped.host_victims)
            tree.register_adapter(adapter.key, adapter.size)
        self.receive(tree.collect_doomed())
        self.receive_host(tree.collect_doomed_host())

    def verify(self, adapter: Node, node: Node, prompt: tuple[int, ...], *, host: bool) -> None:
        """The bytes of the matched path are those of its tokens."""
        position = 0
        for one in self.tree.path(node):
            complete = one.transfer is None
            for slots, has in ((one.payload, one.resident and not host), (one.host_payload, one.host)):
                if has and complete:
                    for i, slot in enumerate(slots):
                        assert self.bytes[slot] == (adapter.key, prompt[: position + i + 1])
            position += one.size
        assert position == len(prompt)

    def check(self) -> None:
        self.tree.check(lambda payload: payload)
        tree, (device, host) = self.tree, self.sizes
        assert len(self.free) + tree.evictable_size + tree.protected_size == device
        assert len(self.host_free) + tree.host_size == host
        assert len(set(self.free)) == len(self.free) and len(set(self.host_free)) == len(self.host_free)


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("policy", [lambda: create_policy("lru"), Independent], ids=["lru", "independent"])
@pytest.mark.parametrize("steps", [12_000, pytest.param(150_000, marks=pytest.mark.full)])
def test_random_lives_keep_both_tiers_sound_and_their_bytes_right(
    page: int, steps: int, policy: Callable[[], Policy]
) -> None:
    name = f"{SEED}/{page}"
    print(f"seed {name}; repeat with ELORA_TREE_SEED={SEED}")
    memory = Memory(random.Random(name), page, 60 * page, 90 * page, policy())
    for step in range(steps):
        try:
            memory.step()
            if step % 7 == 0:
                memory.check()
        except Exception as error:
            raise AssertionError(f"seed {name}, step {step}: {error!r}") from error
    assert min(memory.counts.values()) >= steps // 2000, memory.counts
