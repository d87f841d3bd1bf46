"""Admission with the real adder and cache: who passes whom, how long anybody waits, what a pass costs."""

from __future__ import annotations

import random

import pytest
from sglang.srt.managers.schedule_policy import PrefillAdder
from support.admission_world import Anybody, Nobody, World

from elora_sglang.core.overtaking import Overtaking


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thing of a server's configuration that the adder reads here."""
    monkeypatch.setattr(PrefillAdder, "_replay_len", lambda *_: 0)


def holder_and_waiter(holder: int = 300) -> tuple[World, list]:
    """A pool of 1,000 in which `a` runs, so that `b` waits for its 700 slots."""
    world = World(1000, {"a": 600, "b": 700})
    running = world.ask("a", max_new=holder)
    assert world.iterate() == [running]
    return world, [running, world.ask("b")]


def test_one_that_just_arrived_is_not_passed_and_one_that_waits_is() -> None:
    world, (_, waiter) = holder_and_waiter()
    base = world.ask(None, max_new=10)
    admitted = 0
    while not (batch := world.iterate()):
        assert world.calls["looked at"] <= 2
        admitted += 1
    assert batch == [base] and world.queue == [waiter]
    assert admitted == 10, "its prefill and ten tokens fit into what the waiter has waited, and a batch"
    assert world.rule.passes == 1 and world.rule.overtakers(waiter.rid) == [base.rid]


def test_long_requests_wait_behind_it_and_in_order_afterwards() -> None:
    world, (running, waiter) = holder_and_waiter(holder=40)
    long = world.ask(None, max_new=100)
    while waiter in world.queue:
        world.iterate()
        assert running in world.running.reqs or long in world.queue or waiter not in world.queue
    assert world.rule.passes == 0
    world.drain()
    assert world.waits[long.rid] >= world.waits[waiter.rid]


def test_while_its_overtakers_hold_what_it_lacks_nobody_passes() -> None:
    """The holder ends early; the overtakers' adapter, which only they hold, is what the waiter lacks."""
    world, (running, waiter) = holder_and_waiter(holder=100)
    running.length = 60
    for _ in range(50):
        world.iterate()
    overtakers = [world.ask("a", max_new=40) for _ in range(3)]
    assert world.iterate() == overtakers
    while running in world.running.reqs:
        world.iterate()
    late = world.ask(None, max_new=1)
    lag = world.rule.lag
    while world.queue:
        assert not world.iterate() or overtakers[0] not in world.running.reqs
    assert world.waits[late.rid] >= 20 and world.rule.lag > lag + 20
    assert world.waits[waiter.rid] <= 2 * 61


def test_a_copy_on_its_way_keeps_its_room_and_lets_others_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1000, {"a": 100, "b": 400}, host=2000)
    world.ask("a", max_new=300)
    world.iterate()
    late = world.ask("b", max_new=20)
    near = False
    monkeypatch.setattr(world.cache.manager, "ready", lambda rid: rid != late.rid or near)
    base = world.ask(None, max_new=100)
    assert world.iterate() == [base], "long as it is: both fit"
    more = world.ask(None, max_new=100)
    for _ in range(20):
        world.iterate()
    assert more in world.queue, "what is left is the room of the one whose copy is under way"
    assert not world.running.batch_is_full, "its copy may end before anybody who runs"
    near = True
    assert world.iterate() == [late]


def test_retracted_and_aborted_requests_leave_nothing_behind() -> None:
    world, (_, waiter) = holder_and_waiter()
    for _ in range(30):
        world.iterate()
    base = world.ask(None)
    assert world.iterate() == [base]
    world.running.reqs.remove(base)
    world.harness.finish(base, checkpoint=False)
    base.prefix_len, base.output_ids[:] = 0, type(base.output_ids)("q")
    world.queue.append(base)
    world.cache.enqueued(base)
    assert world.rule.overtakers(waiter.rid) == []
    world.abort(waiter)
    world.drain()
    assert world.rule.waiting == 0 and not world.rule._clocks and not world.harness.balance()


def burst(rule: Overtaking, seed: int, depth: int) -> tuple[World, dict[str, int]]:
    """``depth`` requests at once; returns the world at its end and the largest figures of any pass."""
    rng = random.Random(seed)
    adapters = {f"a{i}": rng.randint(100, 700) for i in range(6)}
    world = World(1200, adapters, rows=32, rule=rule)
    for _ in range(depth):
        name = None if rng.random() < 0.5 else f"a{min(int(rng.expovariate(0.7)), 5)}"
        new = rng.randint(1, 12)
        world.ask(name, prompt=rng.randint(2, 12), max_new=new, length=rng.randint(1, new))
    worst = {"matched in vain": 0, "closed": 0}
    while world.queue or world.running.reqs:
        admitted = world.iterate()
        in_vain = world.calls["matched"] - len(admitted)
        worst["matched in vain"] = max(worst["matched in vain"], in_vain)
        if world.queue and not admitted and not rule._fcfs_waits:
            worst["closed"] = max(worst["closed"], world.calls["looked at"])
    assert world.rule.waiting == 0 and not world.harness.balance()
    return world, worst


@pytest.mark.parametrize("depth", [1, 10, 100, 1000])
def test_nobody_waits_more_than_twice_as_long_as_in_queue_order(depth: int) -> None:
    """The same burst three times through the real adder: by the rule, in queue order, and whoever fits."""
    seed = 77 + depth
    rule, worst = burst(Overtaking(), seed, depth)
    fcfs, _ = burst(Nobody(), seed, depth)
    anybody, _ = burst(Anybody(), seed, depth)
    for rid, wait in rule.waits.items():
        assert wait <= 2 * fcfs.waits[rid], f"seed {seed}: {rid} waits {wait}, under FCFS {fcfs.waits[rid]}"
    over = max(anybody.waits[rid] - 2 * fcfs.waits[rid] for rid in fcfs.waits)
    mean = sum(rule.waits.values()) / max(sum(fcfs.waits.values()), 1)
    print(
        f"seed {seed}, depth {depth}: {rule.rule.passes} passes, mean wait {mean:.2f} and makespan "
        f"{rule.rule.batches / fcfs.rule.batches:.2f} of FCFS, anybody {over} batches beyond; worst pass {worst}"
    )
    # A pass matches nobody but those it admits, the first that lacks room, and one whose tokens do not fit.
    assert worst["matched in vain"] <= 2
    assert worst["closed"] <= 1, "where nobody may pass, nobody behind is looked at"
    if depth >= 100:
        assert rule.rule.passes > 0 and over > 20
