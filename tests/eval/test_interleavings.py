"""The search through all orders of events: it finds planted faults, and none without them.

``python -m elora_sglang.eval explore`` goes deeper; docs/interleavings.md has the figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import planted_faults as planted

from elora_sglang.core import trace
from elora_sglang.core.policies import policy_names
from elora_sglang.eval.cli import main
from elora_sglang.eval.interleavings import canonical, snapshot
from elora_sglang.eval.interleavings.scenes import ANY, SCENES, STARTS, Event, Scene
from elora_sglang.eval.interleavings.search import Explorer, record, told
from elora_sglang.eval.interleavings.world import World

#: One adapter, no copy that cannot start: what most faults need.
SMALL = Scene(policy=ANY, adapters=("a",), jams=False)


# -- the core, as it is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, depth", [("device", 8), ("any-narrow", 6), ("files", 5)])
def test_all_rules_hold_in_every_order_of_events(name: str, depth: int) -> None:
    seen = Explorer(SCENES[name][0]).run(depth)
    assert seen.found is None, "\n".join([seen.found.error, *told(seen.found)])
    assert seen.depth == depth and seen.states > 1_000
    assert len(seen.longest) == depth


@pytest.mark.parametrize("name", SCENES)
def test_all_rules_hold_at_first_in_every_scene(name: str) -> None:
    seen = Explorer(SCENES[name][0]).run(3)
    assert seen.found is None, "\n".join([seen.found.error, *told(seen.found)])


@pytest.mark.parametrize("policy", policy_names())
def test_all_rules_hold_at_first_under_every_policy(policy: str) -> None:
    seen = Explorer(replace(SMALL, policy=policy, before=STARTS["saved"])).run(3)
    assert seen.found is None, "\n".join([seen.found.error, *told(seen.found)])


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SCENES)
def test_all_rules_hold_to_a_depth_of_eight(name: str) -> None:
    seen = Explorer(SCENES[name][0]).run(8)
    assert seen.found is None, "\n".join([seen.found.error, *told(seen.found)])
    assert seen.depth == 8


# -- planted faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plant, scene, rule, shortest",
    [
        (
            planted.slots_go_before_the_save_has_read_them,
            replace(SMALL, before=STARTS["chat"]),
            "I4: device slots are freed while",
            [("tick", None, True), ("evict", 0)],
        ),
        (
            planted.unload_takes_what_a_copy_needs,
            replace(SMALL, before=STARTS["chat"]),
            "I4",
            [("unload", "a")],
        ),
        (
            planted.batch_overtakes_a_released_save,
            replace(SMALL, before=STARTS["split"]),
            "bytes",
            [("ask", "a", (1, 2, 3)), ("evict", 1), ("pass",), ("run",), ("tick", 0, True)],
        ),
        (planted.batch_has_no_fence, SMALL, "bytes", [("ask", "a", (1, 2, 3)), ("pass",), ("run",)]),
        (planted.guards_stay, SMALL, "queue", None),
        (planted.failed_copy_keeps_its_lock, replace(SMALL, before=STARTS["chat"]), "I4", None),
    ],
    ids=("save", "unload", "released", "fence", "guards", "failed"),
)
def test_a_planted_fault_is_found_by_its_shortest_way(
    plant: planted.Plant,
    scene: Scene,
    rule: str,
    shortest: list[Event] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    found = Explorer(scene, ending=False).run(6).found
    assert found is not None
    assert rule in found.error
    if shortest is not None:
        assert found.path == shortest
    assert Explorer(scene, ending=False).run(len(found.path) - 1).found is None  # there is no shorter one
    monkeypatch.undo()
    assert Explorer(scene, ending=False).run(len(found.path)).found is None  # it was the fault


def test_the_doomed_branch_that_was_not_offered_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault of commit 8a55e64, which random lives had found after hours."""
    planted.doomed_branch_is_not_offered(monkeypatch)
    found = Explorer(SCENES["independent"][0], ending=False).run(6).found
    assert found is not None
    assert "'a'" in found.error and "doomed> could be evicted, but has no entry" in found.error
    assert [event[0] for event in found.path] == ["ask", "pass", "run", "evict", "unload", "finish"]


def test_what_never_ends_is_found_and_its_ending_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elora_sglang.core.manager.CacheManager.forget", lambda self, rid: None)
    found = Explorer(SMALL).run(3).found
    assert found is not None
    monkeypatch.undo()
    monkeypatch.setattr("elora_sglang.core.admission.Admission.bring_in", lambda self, *_: self.no_room(*_))
    monkeypatch.setattr("elora_sglang.core.admission.Admission._nothing_will_end", lambda self: False)
    found = Explorer(replace(SMALL, host=0)).run(3).found
    assert found is not None and "liveness" in found.error
    assert found.path == [("ask", "a", (1, 2, 3))]
    assert "and then, for everything to end:" in "\n".join(told(found))


# -- the search itself ------------------------------------------------------------------------------------


def walks(scene: Scene, depth: int) -> Iterator[tuple[bytes, World]]:
    """Every world that ``depth`` events can lead to, equal states as often as there are ways to them."""
    level = [snapshot.take(World(scene))]
    for _ in range(depth):
        following = []
        for taken in level:
            for event in snapshot.make(taken).events():
                world = snapshot.make(taken)
                world.apply(event)
                following.append(snapshot.take(world))
                yield canonical.name(world), world
        level = following


@pytest.mark.parametrize("scene", [Scene(policy=ANY), Scene(before=STARTS["split"], adapters=("a",))])
def test_states_of_one_name_go_on_alike(scene: Scene) -> None:
    """What the reduction leaves out decides nothing: all worlds of one name lead to the same names."""
    following: dict[bytes, frozenset[bytes]] = {}
    again = 0
    for name, world in walks(scene, 3):
        taken, names = snapshot.take(world), set()
        for event in world.events():
            one = snapshot.make(taken)
            one.apply(event)
            names.add(canonical.name(one))
        again += name in following
        assert following.setdefault(name, frozenset(names)) == names
    assert again > 200


@pytest.mark.parametrize("policy", [ANY, "elora"])
def test_a_snapshot_goes_on_as_the_world_it_was_taken_from(policy: str) -> None:
    world = World(replace(SMALL, policy=policy, before=STARTS["split"]))
    copy = snapshot.make(snapshot.take(world))
    assert copy.manager is not world.manager
    assert copy.manager.admission._ready.__closure__[0].cell_contents is copy.manager
    for event in [
        ("ask", "a", (1, 4)),
        ("pass",),
        ("tick", None, True),
        ("run",),
        ("unload", "a"),
        ("finish", 0),
    ]:
        copy.apply(event)
        assert canonical.name(copy) != canonical.name(world)
        world.apply(event)
        assert canonical.name(copy) == canonical.name(world)


def test_to_name_a_state_changes_nothing() -> None:
    world = World(replace(SCENES["elora"][0], before=(("ask", "a", (1, 2, 3)), ("flush",), ("pass",))))
    other = snapshot.make(snapshot.take(world))
    canonical.name(world)
    for one in (world, other):
        one.apply(("tick", None, True))
    assert canonical.name(world) == canonical.name(other)


def after(*events: Event) -> bytes:
    return canonical.name(World(Scene(placed=False, before=events)))


def test_alike_adapters_have_one_name_and_different_prompts_two() -> None:
    """The order of registration breaks ties, so the younger of two is like the younger of two, whatever its name."""
    again = [(("unload", name), ("load", name)) for name in ("a", "b")]
    younger_a, younger_b = after(*again[0], ("ask", "a", (1, 4))), after(*again[1], ("ask", "b", (1, 4)))
    assert younger_a == younger_b
    assert younger_a != after(*again[0], ("ask", "b", (1, 4)))
    assert younger_a != after(*again[0], ("ask", "a", (1, 2, 3)))


def test_the_longest_path_replays_as_a_trace(tmp_path: Path) -> None:
    scene = Scene(before=STARTS["split"], jams=False)
    seen = Explorer(scene, ending=False).run(4)
    file = tmp_path / "path.jsonl"
    file.write_text(record(scene, seen.longest), encoding="utf-8")
    assert trace.main([str(file)]) == 0
    names = {json.loads(line)[0] for line in file.read_text(encoding="utf-8").splitlines()[1:]}
    assert {"consider", "begin_pass", "tick", "lock", "unregister"} <= names


def test_the_command_prints_a_table_and_fails_with_the_way_to_a_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert main(["explore", "--scenes", "device,lru", "--depth", "2", "--trace-out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "transitions" in shown and "holds" in shown
    assert [file.name for file in tmp_path.iterdir()] == ["lru.jsonl"]
    assert main(["explore", "--scenes", "lru", "--depth", "9", "--seconds", "0.01", "--strict"]) == 1
    planted.slots_go_before_the_save_has_read_them(monkeypatch)
    capsys.readouterr()
    assert main(["explore", "--scenes", "saved", "--policies", "lru,any", "--json", "--depth", "4"]) == 1
    said = capsys.readouterr()
    assert "freed while" in said.err and "ask " in said.err
    assert json.loads(said.out)["tables"][0]["rows"][0][-1] == "broken"
