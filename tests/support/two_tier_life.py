"""A device and a host pool with bytes, and a random life of the tree between them: copies late, failing, in any order.

What a slot holds is the token prefix (or the adapter) that was written there, so wrong bytes are seen.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from functools import partial

from elora_sglang.core.policies.base import BasePolicy, Policy
from elora_sglang.core.tree.node import Kind
from elora_sglang.core.tree.tree import DependencyTree, HostVictim, Node, Transfer, Victim
from elora_sglang.eval.interleavings.memory import TuplePayloads


def tokens(*values: int) -> array[int]:
    """A key."""
    return array("q", values)


class Independent(BasePolicy):
    """LRU without the dependency; adapters first."""

    dependency = False

    def priority(self, node: Node) -> float:
        return node.last_tick

    def side(self, need: Kind, used_by_adapters: int) -> Kind | None:
        return "adapter"


class Memory:
    """Plays both pools.

    Args:
        lock_host_copies: also lock what only the host has, as a plan does before it makes room. Off where a seed
            must mean what it meant before.
    """

    def __init__(
        self,
        rng: random.Random,
        page: int,
        device: int,
        host: int,
        policy: Policy,
        *,
        lock_host_copies: bool = False,
    ) -> None:
        self.rng, self.page, self.sizes = rng, page, (device, host)
        self.lock_host_copies = lock_host_copies
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
            tree.unlock(node)  # the transfer holds it now
            if self.rng.random() < 0.1 and not tree.parts.transfers.in_use(transfer.id):  # cannot be started
                self.copies[transfer.id] = lambda: None
                return self.finish(transfer.id, False)
            for one in transfer.nodes:
                tree.set_payload(one, self.take(one.size))
            moves = [(one.host_payload, one.payload) for one in transfer.nodes]
            self.start(transfer, moves)
        else:
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
        if transfer.kind == "load" and self.tree.parts.transfers.in_use(id):
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
        elif action == "lock" and len(self.held) < 5 and self.lock_host_copies:
            node = tree.match(adapter, tokens(*prompt)).host_node
            tree.lock(node)
            self.held.append(node)
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
