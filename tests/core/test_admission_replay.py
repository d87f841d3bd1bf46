"""Admission decisions are in the trace: they are replayed, and a different one is found."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from support.manager_runtime import COSTS, Runtime

from elora_sglang.core.admission import MAX_READS, Admission, Ask, Entry, Holding
from elora_sglang.core.manager import CacheManager, SwapSettings
from elora_sglang.core.trace import Recorder, replay
from elora_sglang.eval.interleavings.memory import TuplePayloads

ANSWERED = ("consider", "bring_in", "no_room", "no_tokens")


def recorded_life(seed: int, steps: int = 600, prefetch: bool = True) -> tuple[Runtime, list[str]]:
    """A life under pressure in which requests are looked past, and its trace."""
    lines: list[str] = []
    settings = SwapSettings(host_slots=300, queue_prefetch=prefetch)
    runtime = Runtime(random.Random(seed), "elora", settings, device=150)
    manager = CacheManager(1, 150, "elora", TuplePayloads(), settings, COSTS)
    Recorder(manager, lines.append)
    runtime.manager = manager
    for key, size in runtime.sizes.items():
        manager.register(key, size)
    for _ in range(steps):
        runtime.step()
    return runtime, lines


def test_a_life_with_overtaking_replays_with_its_admission_decisions() -> None:
    runtime, lines = recorded_life(9)
    assert runtime.looked_past > 20 and runtime.manager.admission.overtaking.passes > 0
    assert replay(lines).mismatch is None


def test_a_life_without_prefetch_brings_its_adapters_in_at_admission() -> None:
    _, lines = recorded_life(9, prefetch=False)
    events = [json.loads(line)[0] for line in lines[1:]]
    assert events.count("brought_in") >= 20 and {"begin_pass", "consider", "bring_in", "started"} <= set(
        events
    )
    assert replay(lines).mismatch is None


@pytest.mark.parametrize("event", ["consider", "bring_in"])
@pytest.mark.parametrize("field", [1, 2, 3])
def test_a_planted_different_admission_is_found(event: str, field: int) -> None:
    """One answer of the recording is changed: who may enter, what is set aside, whether the scan ends."""
    _, lines = recorded_life(9, steps=200)
    numbers = [n for n, line in enumerate(lines) if n and json.loads(line)[0] == event]
    number = numbers[len(numbers) // 2]
    said = json.loads(lines[number])
    answer = said[3]
    answer[field] = answer[field] + 1 if field == 2 else not answer[field]
    lines[number] = json.dumps(said)
    mismatch = replay(lines).mismatch
    assert mismatch is not None and mismatch.startswith(f"event {number} ({event})")


def test_a_planted_different_question_changes_a_later_answer() -> None:
    """The same life told with less room: the replay decides otherwise than was recorded."""
    _, lines = recorded_life(9, steps=200)
    changed = []
    for line in lines:
        said = json.loads(line)
        if isinstance(said, list) and said[0] == "bring_in":
            said[1][0]["ask"][3] = 0
        changed.append(json.dumps(said))
    mismatch = replay(changed).mismatch
    assert mismatch is not None and "bring_in" in mismatch


class Pool:
    """A pool of 100 slots with adapters of 40 slots, some of them on the host."""

    def __init__(self) -> None:
        self.manager = CacheManager(1, 100, "lru", TuplePayloads(), SwapSettings(host_slots=400), COSTS)
        for name in ("a", "b", "c", "d"):
            self.manager.register(name, 40)
        self.ready: dict[str, bool] = {}
        self.admission = Admission(self.manager.tree, lambda rid: self.ready.get(rid, True))

    def ask(self, rid: str, adapter: str | None, **values: Any) -> Ask:
        fields = {
            "need": 10,
            "room": 100,
            "length": 8,
            "left": 4,
            "chunk_left": None,
            "rows": 9,
            "alone": False,
        }
        return Ask(rid=rid, adapter=adapter, **{**fields, **values})

    def waits(self, *rids: str) -> None:
        for rid in rids:
            self.admission.overtaking.queue(rid, for_adapter=True)


def test_adapter_and_tokens_must_fit_together() -> None:
    pool = Pool()
    pool.waits("r", "s")
    pool.admission.begin_pass([], None)
    assert pool.admission.bring_in(pool.ask("r", "a", room=51)) == Entry(True)
    entry = pool.admission.bring_in(pool.ask("s", "b", room=50))
    assert not entry.may and not entry.set_aside and pool.admission.blocked == "s"


def test_what_never_fits_is_said_to_be_hopeless_and_only_when_nothing_will_end() -> None:
    pool = Pool()
    pool.waits("r")
    pool.admission.begin_pass([], None)
    assert pool.admission.bring_in(pool.ask("r", "a", need=70, alone=True)).hopeless
    assert not pool.admission.bring_in(pool.ask("r", "a", need=70)).hopeless, "somebody runs"
    node = pool.manager.tree.adapter("b")
    assert node is not None
    pool.manager.make_resident(node, tuple(range(40)))
    pool.manager.lock(node)
    assert not pool.admission.bring_in(pool.ask("r", "a", need=70, alone=True)).hopeless, "a lock holds it"
    assert pool.admission.no_tokens(pool.ask("r", None, alone=False), pool.manager.tree.base, 0).closed


def test_a_pass_reads_few_files_and_looks_past_the_next() -> None:
    pool = Pool()
    pool.waits("p", "q", "r", "s")
    pool.admission.begin_pass([], None)
    for rid, adapter in zip("pq", "ab", strict=True):
        assert pool.admission.consider(pool.ask(rid, adapter)).may
        pool.admission.brought_in(read=True)
    assert MAX_READS == 2 and not pool.admission.consider(pool.ask("r", "c")).may
    node = pool.manager.tree.adapter("d")
    assert node is not None
    pool.manager.place_on_host(node, tuple(range(40)))
    pool.admission.begin_pass([], None)
    pool.admission.brought_in(read=True)
    pool.admission.brought_in(read=True)
    assert pool.admission.consider(pool.ask("s", "d")).may, "a host copy takes nobody's time"


def test_a_copy_far_from_done_has_its_room_set_aside_and_nothing_waits_for_it_alone() -> None:
    pool = Pool()
    pool.waits("r")
    pool.ready["r"] = False
    pool.admission.begin_pass(["x"], None)
    entry = pool.admission.consider(pool.ask("r", "a"))
    assert not entry.may and entry.set_aside == 50 and pool.admission.looked_past
    pool.admission.begin_pass([], None)
    assert pool.admission.consider(pool.ask("r", "a")).may, "nothing ran since: it waits in the forward"


def test_what_overtakers_hold_counts_once_and_shared_adapters_stay() -> None:
    """`late` overtook `r`; it holds adapter a alone, or shares it with `early`."""
    pool = Pool()
    node = pool.manager.tree.adapter("a")
    assert node is not None
    pool.manager.make_resident(node, tuple(range(40)))
    pool.waits("r", "late")
    admission = pool.admission
    admission.begin_pass([], None)
    admission.consider(pool.ask("r", "b", room=30))
    admission.bring_in(pool.ask("r", "b", room=30))
    admission.consider(pool.ask("late", "a"))
    admission.enters("late")
    late, early = Holding("late", "a", 5, node), Holding("early", "a", 7, node)
    admission.begin_pass(["late"], None)
    assert admission.wants_holdings("r") and admission.overtaking.overtakers("r") == ["late"]
    assert admission._held_by_overtakers("r", [late]) == 45
    assert admission._held_by_overtakers("r", [late, early]) == 5
