"""Admission where KV may outlive its adapter (policy ``static``, ``--elora-without dependency``)."""

from __future__ import annotations

import pytest
from sglang.srt.managers.schedule_policy import PrefillAdder
from support.admission_world import World


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thing of a server's configuration that the adder reads here."""
    monkeypatch.setattr(PrefillAdder, "_replay_len", lambda *_: 0)


@pytest.mark.parametrize("host", [0, 1000])
def test_matched_kv_that_made_room_for_its_own_adapter_is_not_used(
    host: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefix of a request outlived its adapter, and the adapter takes the prefix's slots to come back."""
    world = World(
        300, {"a": 100}, host=host, settings={"policy": "static", "without": "queue-prefetch,guard"}
    )
    harness, cache = world.harness, world.cache
    mine, other = list(range(60)), list(range(1000, 1100))
    harness.run(mine, "a")
    harness.run(other)
    for _ in range(4):
        harness.tick()
    cache.executor.run(cache.manager.evict(1))
    assert cache.tree.invalid_kv_size == 60, "the adapter left, its KV stayed"
    # A policy may rank what was matched a moment ago below all else; with guards it takes a queue beyond them.
    (node,) = (one for one in cache.tree.kv_nodes() if one.adapter.key == "a")
    monkeypatch.setattr(
        cache.tree.policy, "priority", lambda one: -1.0 if one.adapter is node.adapter else 1.0
    )
    cache.tree.reprioritize(node)
    world.ask(None, prompt=80, max_new=9)
    world.iterate()  # holds what is free
    again = world.ask("a", tokens=[*mine, 7])
    assert world.iterate() == [again]
    assert cache.tree.invalid_kv_size == 0 and again.lock.node.resident
    assert again.prefix_len == again.host_loaded_length, "what was matched has gone from the device"
    assert cache.auditor is not None
    cache.auditor.require_clean(world.running.reqs)
    harness.forward(again, again.prefix_len)
    world.drain()
    assert harness.balance() == 0
