"""Who may touch a slot when, what cannot start, and copies that fail: never wrong bytes."""

from __future__ import annotations

import pytest
import torch
from support.transfer_world import LAYERS, NEXT, TEN, Faulty, World

from elora_sglang.runtime.transfers.engine import TransferError

# -- who may touch a slot when ------------------------------------------------------------------------


def test_a_released_slot_reused_too_early_spoils_the_copy() -> None:
    """Negative control of the next test."""
    world = World()
    kept = world.all_rows(world.device, TEN)
    world.engine.save(1, TEN, torch.arange(10))
    world.overwrite(world.device, TEN, 7)
    world.engine.drain()
    assert not torch.equal(world.all_rows(world.host, torch.arange(10)), kept)


@pytest.mark.parametrize("how", ["before_forward", "written", "settle"])
def test_a_released_slot_is_written_after_it_was_read(how: str) -> None:
    world = World()
    kept = world.all_rows(world.device, TEN)
    world.engine.save(1, TEN, torch.arange(10))
    world.engine.release_after(1)
    assert world.engine.reading == frozenset(TEN.tolist()) and not world.engine.writing
    assert world.engine.host_writing == frozenset(range(10))
    start = world.clock.slept
    if how == "settle":
        world.engine.wait_for_slots(TEN[3:4])
    else:
        world.engine.before_forward(TEN[3:4] if how == "written" else None)
        counters = world.engine.counters()
        assert counters["forward_waits"] == 1 and counters["forward_wait_s"] == pytest.approx(LAYERS)
    assert world.clock.slept - start == pytest.approx(LAYERS)
    world.overwrite(world.device, TEN, 7)
    assert world.engine.poll() == [(1, True)] and not world.engine.reading
    assert torch.equal(world.all_rows(world.host, torch.arange(10)), kept)


def test_a_batch_that_writes_elsewhere_does_not_wait() -> None:
    world = World()
    world.engine.save(1, TEN, torch.arange(10))
    world.engine.release_after(1)
    world.engine.before_forward(NEXT)
    world.engine.wait_for_slots(NEXT)
    assert world.clock.slept == 0
    world.engine.before_forward(TEN)
    assert world.clock.slept == pytest.approx(LAYERS)
    world.engine.release_after(1)
    world.engine.before_forward()
    assert world.clock.slept == pytest.approx(LAYERS), "it is over"


def test_a_save_that_was_not_released_holds_up_no_batch() -> None:
    world = World()
    world.engine.save(1, TEN, torch.arange(10))
    world.engine.before_forward()
    assert world.clock.slept == 0


@pytest.mark.parametrize("forced", [False, True], ids=["polled", "waited"])
def test_a_load_into_released_slots_comes_after_the_save(forced: bool) -> None:
    world = World()
    host, wanted = world.saved(NEXT)
    kept = world.all_rows(world.device, TEN)
    world.clock.now += 100
    world.engine.save(1, torch.arange(100, 200), torch.arange(20, 120))  # keeps that direction busy
    world.engine.save(2, TEN, torch.arange(10, 20))
    with pytest.raises(TransferError, match="in use"):
        world.engine.load(3, host, TEN)
    world.engine.release_after(2)
    world.engine.load(3, host, TEN)
    assert world.engine.remaining_s(3, 0) == pytest.approx(10 * LAYERS + 1)
    if forced:
        world.engine.fence([3])
        world.engine.wait_layer(LAYERS - 1)
    else:
        while 3 in world.engine.in_flight:
            world.clock.now += 0.25
            world.engine.poll()
    assert torch.equal(world.all_rows(world.host, torch.arange(10, 20)), kept)
    assert torch.equal(world.all_rows(world.device, TEN), wanted)


@pytest.mark.parametrize("forced", [False, True], ids=["polled", "waited"])
def test_a_load_waits_for_the_save_that_writes_its_source(forced: bool) -> None:
    world = World()
    kept = world.all_rows(world.device, TEN)
    world.engine.save(1, TEN, torch.arange(10))
    world.engine.load(2, torch.arange(10), NEXT)
    world.engine.save(3, NEXT, torch.arange(50, 60))  # and the next one for the load
    assert world.engine.remaining_s(2, 0) == pytest.approx(1)
    if forced:
        assert world.engine.wait(3) and world.engine.wait(2)
    else:
        while world.engine.in_flight:
            world.clock.now += 0.25
            world.engine.poll()
    for pool, slots in (
        (world.host, torch.arange(10)),
        (world.device, NEXT),
        (world.host, torch.arange(50, 60)),
    ):
        assert torch.equal(world.all_rows(pool, slots), kept)


def test_readers_share() -> None:
    world = World()
    host, kept = world.saved(TEN)
    world.engine.load(1, host, TEN)
    world.engine.load(2, host, NEXT)
    assert world.engine.writing == frozenset([*TEN.tolist(), *NEXT.tolist()])
    world.engine.wait(1)
    world.engine.poll()
    assert world.engine.host_reading == frozenset(host.tolist()), "the second still reads"
    world.engine.drain()
    assert torch.equal(world.all_rows(world.device, NEXT), kept) and not world.engine.host_reading


# -- what cannot start --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "device", "text"),
    [
        (torch.arange(10), torch.arange(9), "10 slots cannot go to 9"),
        (torch.arange(10).int(), torch.arange(10), "int64"),
        (torch.arange(10).view(2, 5), torch.arange(10), "int64"),
        (torch.arange(120, 130), torch.arange(10), "outside 128"),
        (torch.arange(10), torch.arange(250, 260), "outside 257"),
        (torch.arange(10), torch.arange(-1, 9), "outside 257"),
        (torch.arange(3), torch.tensor([4, 5, 4]), "twice"),
        (torch.arange(10), torch.arange(45, 55), "in use"),  # a load writes some of them
        (torch.arange(10), torch.arange(195, 205), "in use"),  # a save that keeps its slots reads some
    ],
)
def test_wrong_loads_do_not_start(host: torch.Tensor, device: torch.Tensor, text: str) -> None:
    world = World()
    world.engine.load(1, torch.arange(30, 40), NEXT)
    world.engine.save(2, torch.arange(200, 210), torch.arange(50, 60))
    before = world.engine.reading, world.engine.writing, world.engine.host_reading, world.engine.host_writing
    with pytest.raises(TransferError, match=text):
        world.engine.load(3, host, device)
    after = world.engine.reading, world.engine.writing, world.engine.host_reading, world.engine.host_writing
    assert before == after and world.engine.in_flight == [1, 2]
    assert world.engine.counters()["failed_loads"] == 1
    with pytest.raises(TransferError, match="in flight already"):
        world.engine.load(1, torch.arange(3), torch.arange(3))


def test_wrong_saves_do_not_start() -> None:
    world = World()
    world.engine.save(1, TEN, torch.arange(10))
    world.engine.load(2, torch.arange(30, 40), NEXT)
    for target in (torch.arange(5, 15), torch.arange(35, 45)):  # written by the save, read by the load
        with pytest.raises(TransferError, match="in use"):
            world.engine.save(3, torch.arange(100, 110), target)
    assert world.engine.in_flight == [1, 2] and world.engine.counters()["failed_saves"] == 2


# -- copies that fail ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text"), [("raise", "planted"), ("short", "19 of 20 rows"), ("flip", "sent")]
)
def test_a_failure_at_launch(kind: str, text: str) -> None:
    fault = Faulty(1, 1, kind)
    world = World(link=False, copy_layer=fault, verify=True)
    with pytest.raises(TransferError, match=text):
        world.engine.save(1, TEN, torch.arange(10))
    assert not world.engine.in_flight and world.engine.poll() == []
    assert not world.engine.reading and not world.engine.host_writing
    assert world.engine.counters()["failed_saves"] == 1
    world.engine.save(1, TEN, torch.arange(10))
    assert world.engine.poll() == [(1, True)]
    assert torch.equal(world.all_rows(world.host, torch.arange(10)), world.all_rows(world.device, TEN))


@pytest.mark.parametrize("how", ["poll", "wait"])
@pytest.mark.parametrize("kind", ["raise", "short", "flip"])
def test_one_late_failure_is_tried_again(kind: str, how: str) -> None:
    fault = Faulty(1, 1, kind)
    fault.armed = False
    world = World(copy_layer=fault, verify=True)
    host, kept = world.saved(TEN)
    fault.armed = True
    world.engine.load(1, host, TEN)
    if how == "wait":
        world.engine.fence([1])
        world.engine.wait_layer(LAYERS - 1)
    else:
        world.clock.now += 100
        assert world.engine.poll() == []
    assert world.engine.poll() == [(1, True)] and world.engine.counters()["retries"] == 1
    assert torch.equal(world.all_rows(world.device, TEN), kept)


@pytest.mark.parametrize("kind", ["raise", "short", "flip"])
def test_a_second_late_failure_fails_the_transfer(kind: str) -> None:
    world = World(copy_layer=Faulty(1, 2, kind), verify=True)
    world.engine.load(1, torch.arange(10), TEN)
    world.clock.now += 100
    assert world.engine.poll() == []
    assert world.engine.poll() == [(1, False)] and world.engine.poll() == []
    assert not world.engine.in_flight and not world.engine.writing
    with pytest.raises(TransferError, match="load 1, layer 1"):
        world.engine.fence([1])
    assert not world.engine.wait(1)
    counters = world.engine.counters()
    assert (counters["loads"], counters["failed_loads"], counters["loaded_bytes"]) == (0, 1, 0)
    world.engine.load(1, torch.arange(10), TEN)
    world.engine.fence([1])
    assert world.engine.wait(1), "the id starts anew"


def test_a_batch_never_computes_on_a_failed_load() -> None:
    world = World(copy_layer=Faulty(1, 2))
    world.engine.load(1, torch.arange(10), TEN)
    world.engine.fence([1])
    world.engine.wait_layer(0)
    for _ in range(2):
        with pytest.raises(TransferError, match="planted"):
            world.engine.wait_layer(1)
    assert world.engine.poll() == [(1, False)]


def test_what_follows_a_failed_copy_fails() -> None:
    world = World(copy_layer=Faulty(2, 2))
    world.engine.save(1, TEN, torch.arange(10))
    world.engine.load(2, torch.arange(10), NEXT)
    world.engine.drain()
    assert world.engine.poll() == [(1, False), (2, False)]
    world.engine.load(3, torch.arange(10), NEXT)
    assert world.engine.wait(3)
