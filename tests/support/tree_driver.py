"""Drives the dependency tree and the naive model through one random life and compares them at every step.

The driver also plays the pool: it allocates slots, frees victims, and so checks that available + evictable +
protected stays the size of the pool. Every random choice comes from the ``random.Random`` it is given.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Hashable
from itertools import chain

from support.naive_tree import Branch, NaiveTree, Prefix

from elora_sglang.core.tree.ranking import Ranking
from elora_sglang.core.tree.tree import DependencyTree, InvariantError, Node, Victim
from elora_sglang.eval.interleavings.memory import TuplePayloads

Slots = tuple[int, ...]
NAMESPACES: tuple[Hashable, ...] = (None, None, "tenant", ("salt", 7))


class Driver:
    """One tree, one model, one pool.

    Args:
        page_size: of the tree.
        policy: of the tree. ``is_lru`` says whether victims must be the least recently used ones.
        pool: slots in the pool.
    """

    def __init__(self, page_size: int, policy: Ranking, *, is_lru: bool, pool: int) -> None:
        self.page_size = page_size
        self.is_lru = is_lru
        self.pool = pool
        self.tree = DependencyTree(page_size, policy, TuplePayloads())
        self.model = NaiveTree(page_size)
        self.free = list(range(pool))
        self.nodes: dict[int, Node] = {id(self.model.live[None]): self.tree.base}
        self.held: list[tuple[Node, Branch, Prefix]] = []
        self.prompts: list[tuple[int, ...]] = [()]
        self.evicted = {"kv": 0, "adapter": 0}

    # -- operations: each takes one random source and does one thing --------------------------------

    def op_register(self, rng: random.Random) -> None:
        key = rng.choice("abcdefgh")
        size = (ord(key) - ord("a")) * self.page_size  # "a" takes no slots at all
        pinned = rng.random() < 0.1
        branch = self.model.live.setdefault(key, Branch(key, size))
        branch.pinned = pinned
        node = self.tree.register_adapter(key, size, pinned=pinned)
        assert self.nodes.setdefault(id(branch), node) is node

    def op_load(self, rng: random.Random) -> None:
        self._load(rng.choice(list(self.model.live.values())))

    def op_insert(self, rng: random.Random) -> None:
        branch = rng.choice(list(self.model.live.values()))
        space, tokens = rng.choice(NAMESPACES), self._prompt(rng)
        if (branch.slots is None and rng.random() < 0.2) or not self._load(branch):
            return self._expect_refusal(
                lambda: self.tree.insert(self.nodes[id(branch)], array("q", tokens), space, ())
            )
        whole = len(tokens) // self.page_size * self.page_size
        slots = self._allocate(whole)
        if slots is None or branch.slots is None:  # making room may have taken the adapter
            self.free.extend(slots or ())
            return None
        node = self.nodes[id(branch)]
        got = self.tree.insert(node, array("q", tokens), space, tuple(slots), len(tokens))
        matched = self.model.insert(branch, space, tokens[:whole], slots)
        assert got.matched == matched
        self.free.extend(slots[:matched])
        self._compare_path(got.node, branch, (space, tokens[:whole]))
        return None

    def op_match(self, rng: random.Random) -> None:
        self._match(rng)

    def op_lock_match(self, rng: random.Random) -> None:
        if len(self.held) < 12:
            node, branch, prefix = self._match(rng)
            self.tree.lock(node)
            branch.locks.append(prefix)
            self.held.append((node, branch, prefix))

    def op_find(self, rng: random.Random) -> None:
        branch = rng.choice(list(self.model.live.values()))
        space, tokens = rng.choice(NAMESPACES), self._prompt(rng)
        before = (self.tree.nodes, self.tree.tick)
        _, length = self.tree.find(self.nodes[id(branch)], array("q", tokens), space)
        assert length == len(self.model.matched(branch, space, tokens)) * self.page_size
        assert before == (self.tree.nodes, self.tree.tick)

    def op_unlock(self, rng: random.Random) -> None:
        if self.held:
            node, branch, prefix = self.held.pop(rng.randrange(len(self.held)))
            self.tree.unlock(node)
            branch.locks.remove(prefix)
            self._collect()

    def op_evict(self, rng: random.Random) -> None:
        self._evict(rng.randrange(1, self.pool // 3))

    def op_drop(self, rng: random.Random) -> None:
        branch = rng.choice(list(self.model.live.values()))
        if branch.key is None:
            return self._expect_refusal(lambda: self.tree.drop_branch(self.tree.base))
        node = self.nodes[id(branch)]
        dropped = self.tree.drop_branch(node)
        branch.doomed, branch.pinned = True, False
        self.model.doomed.append(self.model.live.pop(branch.key))
        self._receive(dropped.victims)
        left = len(branch.pages) * self.page_size + (branch.size if branch.slots is not None else 0)
        assert dropped.locked_size == left
        assert self.tree.adapter(branch.key) is None
        self._expect_refusal(lambda: self.tree.match(node, array("q", [1]), None))
        self._expect_refusal(lambda: self.tree.insert(node, array("q", [1]), None, (0,)))
        self._bury()
        return None

    def op_split(self, rng: random.Random) -> None:
        branch = rng.choice(list(self.model.live.values()))
        space, tokens = rng.choice(NAMESPACES), self._prompt(rng)
        found = self.model.matched(branch, space, tokens)
        if found:
            prefix = rng.choice(found)
            node = self.tree.split_at(self.nodes[id(branch)], array("q", tokens), space, len(prefix[1]))
            self._compare_path(node, branch, prefix)

    def op_pin(self, rng: random.Random) -> None:
        branch = rng.choice(list(self.model.live.values()))
        if branch.key is not None:
            branch.pinned = rng.random() < 0.2
            self.tree.set_pinned(self.nodes[id(branch)], branch.pinned)

    def op_reset(self, rng: random.Random) -> None:
        if rng.random() < 0.05:
            voided = [node for node, branch, _ in self.held if branch.key is not None]
            self.tree.reset()
            self.model.live, self.model.doomed = {None: Branch(None, 0, ())}, []
            self.nodes, self.held = {id(self.model.live[None]): self.tree.base}, []
            self.free = list(range(self.pool))
            for node in voided:
                self._expect_refusal(lambda node=node: self.tree.unlock(node))  # type: ignore[misc]

    OPERATIONS = (
        ("op_insert", 30),
        ("op_match", 16),
        ("op_lock_match", 16),
        ("op_unlock", 16),
        ("op_find", 4),
        ("op_evict", 4),
        ("op_load", 4),
        ("op_register", 6),
        ("op_split", 3),
        ("op_pin", 2),
        ("op_drop", 2),
        ("op_reset", 1),
    )

    def step(self, rng: random.Random) -> None:
        """One random operation, then everything cheap is compared."""
        names, weights = zip(*self.OPERATIONS, strict=True)
        getattr(self, rng.choices(names, weights)[0])(rng)
        self.compare()

    # -- comparing ----------------------------------------------------------------------------------

    def compare(self) -> None:
        """Sizes against the model and the pool."""
        sizes = (self.tree.evictable_size, self.tree.protected_size)
        assert sizes == self.model.sizes()
        assert len(self.free) + sum(sizes) == self.pool

    def check(self) -> None:
        """The tree's own check, and that tree and free list share out the pool."""
        self.tree.check(lambda payload: payload)
        owned = chain.from_iterable(n.payload for n in self.tree.walk() if n.payload is not None)
        assert sorted([*self.free, *owned]) == list(range(self.pool))

    def _compare_path(self, node: Node, branch: Branch, prefix: Prefix) -> None:
        expected = [branch.pages[p].slots for p in self.model.prefixes(prefix[0], prefix[1])]
        got = [n.payload for n in self.tree.path(node)]
        assert list(chain.from_iterable(got)) == list(chain.from_iterable(expected))
        assert self.tree.adapter_of(node) is self.nodes[id(branch)]

    def _expect_refusal(self, call: object) -> None:
        try:
            call()  # type: ignore[operator]
        except InvariantError:
            self.compare()
        else:
            raise AssertionError("the tree accepted what it must refuse")

    # -- parts of operations ------------------------------------------------------------------------

    def _prompt(self, rng: random.Random) -> tuple[int, ...]:
        # Mostly a cut of an earlier prompt with another end: shared prefixes, splits at any place.
        page, known = self.page_size, rng.choice(self.prompts)
        kept = known[: rng.randrange(len(known) + 1)] if rng.random() < 0.5 else known
        # A page repeats one token most of the time, so that pages collide although they are long.
        added = chain.from_iterable(
            [rng.randrange(3)] * page if rng.random() < 0.8 else [rng.randrange(3) for _ in range(page)]
            for _ in range(rng.randrange(6))
        )
        tokens = (*kept, *added, *[0] * rng.randrange(page))[: 12 * page]
        if len(self.prompts) < 40:
            self.prompts.append(tokens)
        else:
            self.prompts[rng.randrange(1, 40)] = tokens
        return tokens

    def _match(self, rng: random.Random) -> tuple[Node, Branch, Prefix]:
        branch = rng.choice(list(self.model.live.values()))
        space, tokens = rng.choice(NAMESPACES), self._prompt(rng)
        limit = rng.choice((None, rng.randrange(len(tokens) + 3)))
        found = self.model.matched(branch, space, tokens[:limit])
        got = self.tree.match(self.nodes[id(branch)], array("q", tokens), space, limit)
        self.model.use(branch, found)
        assert got.length == len(found) * self.page_size
        prefix = found[-1] if found else (None, ())
        self._compare_path(got.node, branch, prefix)
        return got.node, branch, prefix

    def _load(self, branch: Branch) -> bool:
        if branch.slots is not None:
            return True
        slots = self._allocate(branch.size)
        if slots is None:
            return False
        self.tree.make_resident(self.nodes[id(branch)], tuple(slots))
        self.model.use(branch, [])
        branch.slots = tuple(slots)
        return True

    def _allocate(self, need: int) -> list[int] | None:
        if need > len(self.free):
            self._evict(need - len(self.free))
        if need > len(self.free):
            return None
        taken, self.free = self.free[:need], self.free[need:]
        return taken

    def _evict(self, need: int) -> None:
        victims = self.tree.evict(need)
        for victim in victims:
            oldest = self.model.oldest_leaf_tick()
            last = self._receive([victim])[0]
            assert oldest is not None and (not self.is_lru or last == oldest), f"{victim} is not the oldest"
        freed = sum(victim.size for victim in victims)
        assert freed >= need or self.model.oldest_leaf_tick() is None, "eviction gave up too early"
        assert freed - (victims[-1].size if victims else 0) < need, "eviction took more than it needed"

    def _collect(self) -> None:
        self._receive(self.tree.collect_doomed())
        self._bury()

    def _receive(self, victims: list[Victim]) -> list[int]:
        last_uses = []
        for victim in victims:
            kind, last = self.model.take_slots(list(victim.payload)) if victim.size else ("adapter", 0)
            assert (kind, victim.size) == (victim.kind, len(victim.payload))
            self.evicted[victim.kind] += 1
            self.free.extend(victim.payload)
            last_uses.append(last)
        return last_uses

    def _bury(self) -> None:
        for branch in self.model.doomed:
            if not branch.locks and not branch.size:
                branch.slots = None
        gone = [b for b in self.model.doomed if not b.locks and not b.pages and b.slots is None]
        for branch in gone:
            self.model.doomed.remove(branch)
            # Not forgotten before: Python may give a new Branch the id() of a collected one.
            assert self.nodes.pop(id(branch)).parent is None
