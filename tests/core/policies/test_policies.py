"""Every policy, through the same tests; a new file in ``core/policies/`` is tested by being there."""

from __future__ import annotations

import json
import random
from array import array
from pathlib import Path

import pytest
from golden_policies import GOLDEN, WORKLOADS, decide
from support import seeds
from support.policy_bench import Bench
from support.tree_driver import Driver, TuplePayloads

from elora_sglang.core import policies
from elora_sglang.core.hints import Hints
from elora_sglang.core.policies import create_policy, policy_names
from elora_sglang.core.tree.tree import DependencyTree, Node

EVENTS = ("on_insert", "on_use", "on_access", "on_split", "on_evict", "on_drop", "on_reset")


def test_policies_are_the_files_of_the_package() -> None:
    files = {path.stem for path in Path(policies.__path__[0]).glob("*.py")} - {"__init__", "base"}
    assert set(policy_names()) == files and "lru" in files


def test_a_policy_is_found_without_editing_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "newest_first.py").write_text(
        "from elora_sglang.core.policies.base import BasePolicy\n"
        "class NewestFirst(BasePolicy):\n"
        "    def priority(self, node): return -node.id\n"
        "def create(): return NewestFirst()\n"
    )
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    tree = DependencyTree(1, create_policy("newest_first"), TuplePayloads())
    for first in range(4):
        tree.insert(tree.base, array("q", [first]), None, (first,), 1)
    assert [victim.key for victim in tree.evict(4)] == [3, 2, 1, 0]


def test_an_unknown_policy_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown eviction policy 'fifo'; choose one of: .*lru"):
        create_policy("fifo")


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("name", policy_names())
def test_decisions_are_the_golden_ones(name: str, workload: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden[name][workload] == decide(name, workload), "if intended: see golden_policies.py"


@pytest.mark.parametrize("name", policy_names())
def test_the_same_events_give_the_same_decisions(name: str) -> None:
    assert decide(name, "churn") == decide(name, "churn")


@pytest.mark.parametrize("name", policy_names())
@pytest.mark.parametrize("page_size", [1, 16])
def test_invariants_hold_under_the_policy(name: str, page_size: int) -> None:
    rng = random.Random(seeds.draw())
    bench = Bench(name, device=80 * page_size)
    bench.policy.dependency = True  # what the driver's model knows; `static` without it: test_policy_kinds
    driver = Driver(page_size, bench.policy, is_lru=name == "lru", pool=80 * page_size)
    bench.tree = driver.tree
    hints = (Hints(), Hints("s"), Hints("s", True), Hints(None, True), Hints(None, False, 9.0))
    for number in range(1500):
        driver.step(rng)
        if rng.random() < 0.3:
            bench.at(number * 1.3)
        nodes = [
            node for node in driver.tree.walk() if node.kind != "root" and not driver.tree.is_doomed(node)
        ]
        if rng.random() < 0.3:
            driver.tree.count_use(rng.choice(nodes))
        if rng.random() < 0.3:
            bench.policy.on_finish(rng.choice(nodes), rng.choice(hints))
        if number % 100 == 0:
            driver.check()
    driver.check()


@pytest.mark.parametrize("name", policy_names())
def test_everything_unlocked_can_be_evicted(name: str) -> None:
    tree = DependencyTree(1, create_policy(name), TuplePayloads())
    a = tree.register_adapter("a", 2)
    tree.make_resident(a, (0, 1))
    for first in range(20):
        tree.insert(a, array("q", [first, 7]), None, (10 + 2 * first, 11 + 2 * first), 2)
        tree.match(a, array("q", [first // 2, 7]))
    assert sum(victim.size for victim in tree.evict(10**6)) == 42
    assert (tree.evictable_size, tree.protected_size, tree.counts()["kv"]) == (0, 0, 0)


class Recording:
    """Wraps LRU and writes down the events, to see that each one is reported where the protocol says."""

    def __init__(self) -> None:
        self.events: list[tuple[str, tuple[int, ...]]] = []
        self._lru = create_policy("lru")

    dependency = True
    exact = True

    def priority(self, node: Node) -> float:
        return self._lru.priority(node)

    host_priority = priority

    def side(self, need: str, used_by_adapters: int) -> None:
        return None

    def __getattr__(self, name: str) -> object:
        assert name in EVENTS, name
        return lambda *nodes: self.events.append((name, tuple(node.id for node in nodes)))


def test_the_tree_reports_every_event() -> None:
    policy = Recording()
    tree = DependencyTree(1, policy, TuplePayloads())  # type: ignore[arg-type]  # events come from __getattr__
    a = tree.register_adapter("a", 1)
    tree.make_resident(a, (0,))
    lower = tree.insert(a, array("q", [1, 2]), None, (1, 2), 2).node
    upper = tree.match(a, array("q", [1, 3])).node
    tree.count_use(upper)
    tree.evict(2)
    tree.match(a, array("q", [9]), peek=True)
    tree.drop_branch(a)
    tree.reset()
    assert policy.events == [
        ("on_insert", (a.id,)),
        ("on_insert", (lower.id,)),
        ("on_access", (lower.id,)),
        ("on_split", (upper.id, lower.id)),
        ("on_access", (upper.id,)),
        ("on_use", (a.id,)),
        ("on_use", (upper.id,)),
        ("on_evict", (lower.id,)),
        ("on_drop", (lower.id,)),
        ("on_evict", (upper.id,)),
        ("on_drop", (upper.id,)),
        ("on_evict", (a.id,)),
        ("on_drop", (a.id,)),
        ("on_reset", ()),
    ]
    assert (upper.visits, a.visits) == (1, 1)


def test_a_lowered_priority_takes_effect_when_the_policy_says_so() -> None:
    class Marked:
        """LRU, but what is marked goes first."""

        def __init__(self) -> None:
            self.marked: set[int] = set()
            self._lru = create_policy("lru")

        def priority(self, node: Node) -> float:
            return -1 if node.id in self.marked else self._lru.priority(node)

        def __getattr__(self, name: str) -> object:
            return getattr(self._lru, name)

    policy = Marked()
    tree = DependencyTree(1, policy, TuplePayloads())  # type: ignore[arg-type]  # events come from __getattr__
    nodes = [tree.insert(tree.base, array("q", [i]), None, (i,), 1).node for i in range(5)]
    policy.marked.add(nodes[3].id)
    tree.reprioritize(nodes[3])
    tree.check()
    policy.marked.clear()  # rose again without a use: the entry is out of date, and put right when popped
    policy.marked.add(nodes[4].id)
    tree.reprioritize(nodes[4])
    assert [victim.key for victim in tree.evict(5)] == [4, 0, 1, 2, 3]
