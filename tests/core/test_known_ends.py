"""What a waiting request's walk found last time is used again only where a new walk would find the same."""

from __future__ import annotations

import random
from array import array

import pytest
from support.manager_runtime import COSTS, Request, Runtime, TuplePayloads

from elora_sglang.core.manager import CacheManager, SwapSettings
from elora_sglang.core.trace import Recorder, replay
from elora_sglang.core.tree.tree import DependencyTree


class Crowded(Runtime):
    """Admits late, so that a queue builds up, whose requests are looked up at many plans; some come twice, so
    that what the second finds changes when the first one runs."""

    def arrive(self) -> None:
        super().arrive()
        first = self.waiting[-1]
        if self.rng.random() < 0.3:
            twin = Request(first.rid + "t", first.adapter, first.prompt)
            self.waiting.append(twin)
            self.manager.enqueue(twin.rid, twin.adapter, array("q", twin.prompt[:-1]), None)

    def _pass(self) -> None:
        if len(self.waiting) > 8 or self.rng.random() < 0.3:
            super()._pass()


def recorded(policy: str, page: int, **settings: object) -> list[str]:
    """The trace of a life with late copies and failing ones."""
    chosen = SwapSettings(host_slots=900 * page, **settings)  # type: ignore[arg-type]
    runtime = Crowded(
        random.Random(f"{policy}{page}"), policy, chosen, page=page, device=400 * page, faults=0.05
    )
    manager = CacheManager(page, 400 * page, policy, TuplePayloads(), chosen, COSTS)
    lines: list[str] = []
    Recorder(manager, lines.append)
    runtime.manager = manager
    for key, size in runtime.sizes.items():
        manager.register(key, size)
    for _ in range(2500):
        runtime.step()
    return lines


@pytest.mark.parametrize("policy", ["lru", "slru", "elora"])
@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("guard", [True, False])
def test_decisions_are_those_of_a_walk_at_every_plan(
    policy: str, page: int, guard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(DependencyTree, "still_ends", lambda *_: False)
        lines = recorded(policy, page, guard=guard)
    known = []
    real = DependencyTree.still_ends
    monkeypatch.setattr(DependencyTree, "still_ends", lambda *args: known.append(real(*args)) or known[-1])
    result = replay(lines, players=1)
    assert result.mismatch is None and result.events > 5000
    assert sum(known) > 200, "hardly a walk was spared"
    assert known.count(False) > 20, "what was known never changed: the test shows nothing"


def test_an_end_that_is_trusted_blindly_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = recorded("lru", 1)
    monkeypatch.setattr(DependencyTree, "still_ends", lambda self, node, *_: node.parent is not None)
    assert replay(lines, players=1).mismatch is not None
