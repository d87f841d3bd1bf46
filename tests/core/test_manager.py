"""The manager against a runtime without a model: right bytes, right books, the same decisions on replay."""

from __future__ import annotations

import random
from array import array

import pytest
from support import seeds
from support.manager_runtime import COSTS, Runtime

from elora_sglang.core.actions import Action, Free, FreeHost, Load, Read, Save
from elora_sglang.core.manager import CacheManager, SwapSettings
from elora_sglang.core.policies import policy_names
from elora_sglang.core.trace import Recorder, main, replay
from elora_sglang.core.tree.node import Node
from elora_sglang.eval.interleavings.memory import TuplePayloads


def live(policy: str, steps: int, *, page: int = 1, faults: float = 0.0, **settings: object) -> Runtime:
    name = f"{seeds.draw()}/{policy}/{page}/{faults}/{sorted(settings)}"
    chosen = SwapSettings(**{"host_slots": 900 * page, **settings})  # type: ignore[arg-type]
    runtime = Runtime(random.Random(name), policy, chosen, page=page, device=400 * page, faults=faults)
    for step in range(steps):
        runtime.step()
        if step % 11 == 0:
            runtime.check()
    return runtime


@pytest.mark.parametrize("policy", policy_names())
def test_a_life_under_each_policy_serves_the_right_bytes(policy: str) -> None:
    runtime = live(policy, 1200)
    assert runtime.served > 200 and runtime.hits > 1000


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("faults", [0.0, 0.1])
def test_a_long_life_moves_everything_and_loses_nothing(page: int, faults: float) -> None:
    runtime = live("lru", 5000, page=page, faults=faults)
    counts = runtime.manager.counters()
    least = {"queue_loads": 100, "backups": 100, "demotions": 100, "reads": 6, "host_evictions": 100}
    assert all(counts[name] >= count for name, count in least.items()), counts
    assert counts["failed"] == 0 or faults
    assert faults == 0.0 or counts["failed"] > 50


@pytest.mark.parametrize("off", ["queue_prefetch", "idle_prefetch", "backup", "guard"])
def test_each_part_can_be_switched_off(off: str) -> None:
    counts = live("lru", 1500, **{off: False}).manager.counters()
    counter = {"queue_prefetch": "queue_loads", "idle_prefetch": "idle_loads", "backup": "backups"}.get(off)
    assert counter is None or counts[counter] == 0


def test_without_a_host_nothing_is_copied() -> None:
    runtime = live("lru", 1500, host_slots=0)
    assert not any(isinstance(action, Load | Save | Read) for action in runtime.actions)
    assert all(v.fate == "dropped" for a in runtime.actions if isinstance(a, Free) for v in a.victims)


@pytest.mark.parametrize("policy", policy_names())
def test_a_recorded_life_replays_to_the_same_decisions(policy: str, tmp_path: object) -> None:
    lines: list[str] = []
    runtime = Runtime(random.Random(seeds.draw()), policy, SwapSettings(host_slots=900), faults=0.03)
    # From the start: register was called before, so a fresh runtime's manager is recorded instead.
    fresh = CacheManager(1, 400, policy, TuplePayloads(), SwapSettings(host_slots=900), COSTS)
    Recorder(fresh, lines.append)
    runtime.manager = fresh
    for key, size in runtime.sizes.items():
        fresh.register(key, size)
    for _ in range(800):
        runtime.step()
    result = replay(lines)
    assert result.mismatch is None and result.events > 3000


def test_a_changed_line_is_noticed(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    lines: list[str] = []
    manager = CacheManager(1, 100, "lru", TuplePayloads(), SwapSettings(), COSTS)
    Recorder(manager, lines.append)
    manager.register("a", 3)
    manager.insert(manager.tree.base, array("q", [1, 2]), None, (1, 2))
    manager.evict(1)
    file = tmp_path / "trace"
    file.write_text("\n".join(lines) + "\n")
    assert main([str(file)]) == 0 and "both managers decide as recorded" in capsys.readouterr().out
    file.write_text("\n".join(lines).replace("dropped", "demoted") + "\n")
    assert main([str(file)]) == 1 and "event 3 (evict)" in capsys.readouterr().out
    file.write_text("{}")
    assert main([str(file)]) == 2 and "cannot be replayed" in capsys.readouterr().err


class Small:
    """A manager with adapter a (4 slots) on the host and KV 0..9 of it, all there and clean, off the device."""

    def __init__(self, **settings: object) -> None:
        self.manager = CacheManager(
            1,
            100,
            "lru",
            TuplePayloads(),
            SwapSettings(**{"host_slots": 200, **settings}),  # type: ignore[arg-type]
            COSTS,
        )
        self.next = 1000
        self.a = self.adapter("a")
        self.prompt(self.a, range(10))
        self.demote_all()

    def adapter(self, key: str):  # type: ignore[no-untyped-def]
        node = self.manager.register(key, 4)
        self.manager.place_on_host(node, self.slots(4))
        return node

    def slots(self, count: int) -> tuple[int, ...]:
        self.next += count
        return tuple(range(self.next - count, self.next))

    def prompt(self, adapter, tokens):  # type: ignore[no-untyped-def]
        if not adapter.resident:
            self.manager.make_resident(adapter, self.slots(adapter.size))
        key = array("q", tokens)
        return self.manager.insert(adapter, key, None, self.slots(len(key)), len(key)).node

    def demote_all(self) -> None:
        tree = self.manager.tree
        for node in list(tree.kv_nodes()):
            if not node.host:
                transfer = tree.begin_save(node)
                self.manager.saved(transfer.id, [self.slots(one.size) for one in transfer.nodes])
                tree.end_transfer(transfer.id)
        tree.evict(10**6)

    def load(self, action: Load) -> None:
        self.manager.loaded(action.transfer, [self.slots(item.size) for item in action.items])

    def loads(self, actions):  # type: ignore[no-untyped-def]
        found = [action for action in actions if isinstance(action, Load)]
        for action in found:
            self.load(action)
        return found


def test_a_waiting_request_gets_its_adapter_and_kv_at_the_next_tick() -> None:
    small = Small()
    small.manager.enqueue("r", "a", array("q", range(8)))
    (load,) = small.loads(small.manager.tick(1.0, 100))
    assert [(item.kind, item.size) for item in load.items] == [("adapter", 4), ("kv", 8)]
    assert (load.why, load.rid) == ("queue", "r")


def test_loads_start_in_queue_order_and_never_take_what_an_earlier_request_needs() -> None:
    small = Small(idle_prefetch=False)
    b = small.adapter("b")
    small.prompt(b, range(100, 110))
    small.demote_all()
    small.manager.enqueue("first", "a", array("q", range(10)))
    small.manager.enqueue("second", "b", array("q", range(100, 110)))
    (load,) = small.loads(small.manager.tick(1.0, 14))  # room for one of them
    assert load.rid == "first"
    assert (
        small.manager.tick(2.0, 0, [(load.transfer, True)]) == []
    )  # the rest would cost the first its prefix
    small.manager.started("first", small.manager.tree.find(small.a, array("q", range(10)))[0])
    actions = small.manager.tick(3.0, 0)
    assert isinstance(actions[0], Free) and [load.rid for load in small.loads(actions)] == ["second"]


def test_what_was_loaded_for_a_request_outlives_others_until_it_ran() -> None:
    small = Small(backup=False)
    other = small.prompt(small.manager.tree.base, range(50, 60))
    small.manager.enqueue("r", "a", array("q", range(10)))
    (load,) = small.loads(small.manager.tick(1.0, 90))
    small.manager.tick(2.0, 76, [(load.transfer, True)])
    small.manager.match(small.manager.tree.base, array("q", range(50, 60)))  # the most recent of all
    (free,) = small.manager.evict(5)
    assert isinstance(free, Free) and [victim.node_id for victim in free.victims] == [other.id]


def test_an_adapter_that_is_only_a_file_is_read_first() -> None:
    small = Small(idle_prefetch=False)
    small.manager.register("c", 6)
    small.manager.enqueue("r", "c", array("q", [1, 2]))
    (read,) = small.manager.tick(1.0, 100)
    assert read == Read(read.transfer, "c", 6)
    assert small.manager.ready("r")  # nothing runs: admission may as well wait for it itself
    small.manager.saved(read.transfer, [small.slots(6)])
    (load,) = small.loads(small.manager.tick(2.0, 100, [(read.transfer, True)], running=1))
    assert [item.key for item in load.items] == ["c"]


def test_a_request_waits_for_a_far_load_only_while_others_run() -> None:
    small = Small()
    small.manager.enqueue("r", "a", array("q", range(10)))
    small.loads(small.manager.tick(1.0, 100, running=1))
    assert not small.manager.ready("r")  # 14 ms of copies, 1 ms of prefill to hide them
    small.manager.tick(1.02, 86, running=1)
    assert small.manager.ready("r")
    small.manager.tick(1.0, 86, running=0)
    assert small.manager.ready("r") and small.manager.ready("nobody")


def test_a_request_does_not_wait_a_whole_decode_step_for_a_load_that_is_shorter() -> None:
    small = Small()
    small.manager.tick(1.0, 100, running=1)
    small.manager.tick(1.005, 100, running=1)
    assert small.manager.step_s == pytest.approx(0.005)
    small.manager.enqueue("r", "a", array("q", range(10)))
    small.loads(small.manager.tick(1.01, 100, running=1))
    assert not small.manager.ready("r")  # 14 ms of copies; a step and the prefill take 6
    small.manager.tick(1.0195, 86, running=1)
    assert small.manager.ready("r")  # 4.5 ms are left, and by the next look 5 would have passed


def test_the_decode_step_is_what_the_shortest_iterations_take() -> None:
    small = Small()
    now = 1.0
    small.manager.tick(now, 100)
    small.manager.tick(now := now + 9.0, 100, running=1)
    assert small.manager.step_s == 0.0, "nothing ran in those 9 seconds"
    small.manager.tick(now := now + 0.01, 100, running=1)
    assert small.manager.step_s == pytest.approx(0.01)
    for first, second in ((0.3, 0.01), (0.01, 0.3)):  # the prefill at once, and behind the batch before
        small.manager.started("r", small.manager.tree.base)
        small.manager.tick(now := now + first, 100, running=2)
        small.manager.tick(now := now + second, 100, running=2)
        assert small.manager.step_s == pytest.approx(0.01), "somebody was admitted: there was a prefill"
    small.manager.tick(now := now + 0.1, 100, running=2)
    assert small.manager.step_s == pytest.approx(0.0105), "one long wait is no longer step"
    for _ in range(30):
        small.manager.tick(now := now + 0.02, 100, running=2)
    assert small.manager.step_s == pytest.approx(0.02)


def test_a_file_that_cannot_be_read_is_not_asked_for_again_and_holds_nobody_back() -> None:
    small = Small(idle_prefetch=False)
    small.manager.register("c", 6)
    small.manager.enqueue("r", "c", array("q", [1, 2]))
    (read,) = small.manager.tick(1.0, 100, running=1)
    small.manager.failed(read.transfer)
    assert small.manager.tick(2.0, 100, running=1) == [] and small.manager.ready("r")


def test_idle_prefetch_stops_at_the_watermark_and_for_any_waiting_request() -> None:
    small = Small(idle_watermark=0.5)
    assert small.loads(small.manager.tick(1.0, 50)) == []  # half of it is used
    loads = small.loads(small.manager.tick(2.0, 100))
    assert [load.why for load in loads] == ["idle"]
    busy = Small(idle_watermark=0.5)
    busy.manager.enqueue("r", None, array("q", [7]))
    assert busy.loads(busy.manager.tick(1.0, 100)) == []


def test_new_kv_is_backed_up_below_an_adapter_on_the_host() -> None:
    small = Small(idle_prefetch=False)
    node = small.prompt(small.a, range(20, 25))
    (save,) = small.manager.tick(1.0, 80)
    assert isinstance(save, Save) and [item.node_id for item in save.items] == [node.id]
    small.manager.saved(save.transfer, [small.slots(5)])
    small.manager.tick(2.0, 80, [(save.transfer, True)])
    assert node.clean and node.resident


def test_an_adapter_that_came_from_its_file_is_put_on_the_host_so_that_its_kv_can_follow() -> None:
    small = Small(idle_prefetch=False)
    straight = small.manager.register("c", 4)
    node = small.prompt(straight, range(20, 25))  # makes it resident, not through the host
    (read,) = small.manager.tick(1.0, 80)
    assert isinstance(read, Read) and (read.key, read.size) == ("c", 4)
    small.manager.saved(read.transfer, [small.slots(4)])
    (save,) = small.manager.tick(2.0, 80, [(read.transfer, True)])
    assert isinstance(save, Save) and [item.node_id for item in save.items] == [node.id]


def test_an_adapter_whose_file_is_gone_is_not_read_again_and_again_for_its_kv() -> None:
    small = Small(idle_prefetch=False)
    small.prompt(small.manager.register("c", 4), range(20, 25))
    (read,) = small.manager.tick(1.0, 80)
    small.manager.failed(read.transfer)
    assert all(small.manager.tick(2.0 + i, 80) == [] for i in range(3))


def two_waiters(**settings: object) -> tuple[Small, Node, Node, Node]:
    """``first`` waits for what it needs of a, all on the device; b's KV is on the host, the base model's is not."""
    small = Small(idle_prefetch=False, backup=False, **settings)
    b = small.adapter("b")
    small.prompt(b, range(100, 110))
    small.demote_all()
    small.manager.enqueue("first", "a", array("q", range(10)))
    (load,) = small.loads(small.manager.tick(1.0, 100))
    small.manager.tick(2.0, 86, [(load.transfer, True)])
    base = small.prompt(small.manager.tree.base, range(200, 210))  # the most recent of all
    return small, small.a, base, small.manager.tree.find(b, array("q", range(100, 110)))[0]


def victims(actions: list[Action]) -> list[int]:
    return [victim.node_id for action in actions if isinstance(action, Free) for victim in action.victims]


def test_room_for_a_load_at_admission_takes_what_nobody_waits_for_first() -> None:
    small, a, base, node = two_waiters()
    load = small.manager.load_for(node)
    assert load is not None and load.why == "admission"
    assert victims(small.manager.evict(10)) == [base.id]
    assert small.manager.counters()["guard_breaks"] == 0
    # It needs more than that: an admitted request runs, whoever waits.
    (kv,) = a.children.values()
    assert victims(small.manager.evict(4)) == [kv.id]
    assert small.manager.counters()["guard_breaks"] == 1
    assert victims(small.manager.evict(99)) == [a.id] and small.manager.counters()["guard_breaks"] == 2


def test_room_for_a_load_never_takes_what_the_load_hangs_below() -> None:
    small = Small(idle_prefetch=False, backup=False)
    tree = small.manager.tree
    upper = small.manager.split_at(small.a, array("q", range(10)), None, 4)
    load = small.manager.load_for(upper)
    assert load is not None
    small.load(load)
    small.manager.tick(1.0, 92, [(load.transfer, True)])
    (lower,) = upper.children.values()
    load = small.manager.load_for(lower)
    assert load is not None and [item.node_id for item in load.items] == [lower.id]
    assert small.manager.evict(10**6) == [] and tree.evictable_size == 0


def test_a_plan_evicts_nothing_for_a_load_that_guards_leave_no_room_for() -> None:
    small, _, base, _ = two_waiters()
    small.manager.enqueue("second", "b", array("q", range(100, 110)))  # 14 slots; what nobody needs is 10
    assert small.manager.tick(3.0, 0) == [] and base.resident
    actions = small.manager.tick(4.0, 4)
    assert victims(actions) == [base.id] and [load.rid for load in small.loads(actions)] == ["second"]
    assert small.manager.counters()["guard_breaks"] == 0


def test_what_an_unloaded_branch_left_is_room_and_breaks_no_guard() -> None:
    small, _, base, _ = two_waiters()
    tree = small.manager.tree
    c = small.adapter("c")
    node = small.prompt(c, range(300, 305))
    small.manager.lock(node)
    small.manager.unregister("c")
    small.manager.unlock(node)
    assert sorted(victims(small.manager.evict(1))) == sorted([c.id, node.id])
    tree.evict(base.size)
    assert tree.peek_victim().guard and small.manager.counters()["guard_breaks"] == 0


def test_a_full_host_makes_room_by_value() -> None:
    small = Small(host_slots=20, idle_prefetch=False)
    (old,) = small.a.children.values()
    new = small.prompt(small.a, range(20, 28))
    small.manager.match(small.a, array("q", range(10)))  # what the host has is the more valuable
    assert small.manager.tick(1.0, 80) == [] and old.clean
    small.manager.match(small.a, array("q", range(20, 28)))
    small.manager.swapper.offer(new)
    freed, save = small.manager.tick(2.0, 80)
    assert isinstance(freed, FreeHost) and [(v.node_id, v.gone) for v in freed.victims] == [(old.id, True)]
    assert isinstance(save, Save) and [item.node_id for item in save.items] == [new.id]
    assert small.manager.counters()["host_evictions"] == 1


def test_an_adapter_larger_than_the_host_costs_the_host_nothing() -> None:
    small = Small(host_slots=20, idle_prefetch=False)
    (old,) = small.a.children.values()
    large = small.manager.register("c", 30)
    small.manager.enqueue("r", "c", array("q", [1, 2]))
    assert small.manager.tick(1.0, 100, running=1) == [] and old.clean
    assert small.manager.ready("r"), "admission reads its file"
    small.manager.make_resident(large, small.slots(30))
    small.prompt(large, range(5))
    assert small.manager.tick(2.0, 60) == [] and old.clean, "nor for the sake of its KV"


def test_above_the_busy_watermark_clean_leaves_go_until_there_is_room() -> None:
    small = Small(idle_prefetch=False, backup=False, busy_watermark=0.5, idle_watermark=0.0)
    load = small.manager.load_for(next(iter(small.a.children.values())))
    assert load is not None
    small.load(load)
    assert small.manager.tick(1.0, 50, [(load.transfer, True)]) == [], "exactly at the watermark"
    assert victims(small.manager.tick(2.0, 49)) == [load.items[1].node_id]
    assert small.manager.counters()["swap_outs"] == 1
    dirty = small.prompt(small.a, range(50, 55))
    assert small.manager.tick(3.0, 0) == [] and dirty.resident, "a dirty leaf would be lost"


def test_above_the_busy_watermark_what_somebody_waits_for_stays() -> None:
    small, a, base, _ = two_waiters(busy_watermark=0.5, idle_watermark=0.0)
    small.manager.evict(base.size)
    assert small.manager.tick(3.0, 0) == [] and a.resident
    small.manager.forget("first")
    assert victims(small.manager.tick(4.0, 0))[-1] == a.id and small.manager.counters()["swap_outs"] == 2


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="idle <= busy"):
        SwapSettings(busy_watermark=0.5, idle_watermark=0.6)
    with pytest.raises(ValueError, match="at least 0"):
        SwapSettings(host_slots=-1)
