"""Copies between the tiers: exact bytes, in order, late when the link says so, and never wrong ones."""

from __future__ import annotations

import random
import time

import pytest
import torch
from transfer_world import LAYERS, Faulty, World, make_device

from elora_sglang.runtime.host_pool import HostPool
from elora_sglang.runtime.link import LOAD, SAVE, Link
from elora_sglang.runtime.pool import UnifiedPool
from elora_sglang.runtime.row_copy import RowCopy
from elora_sglang.runtime.transfers import TransferEngine, TransferError

TEN, NEXT = torch.arange(20, 30), torch.arange(40, 50)


def whole_pages(firsts: list[int], page: int) -> torch.Tensor:
    return (torch.tensor(firsts)[:, None] * page + torch.arange(page)).flatten()


# -- bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [False, True], ids=["at once", "link"])
@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
@pytest.mark.parametrize("order", ["run", "scattered", "backwards", "few runs"])
def test_round_trip(order: str, dtype: torch.dtype, page: int, link: bool) -> None:
    world = World(page=page, dtype=dtype, link=link, verify=True)
    total = 256 // page
    generator = torch.Generator().manual_seed(9)
    pages = {
        "run": list(range(2, 2 + total // 4)),
        "scattered": torch.randperm(total, generator=generator)[: total // 4].tolist(),
        "backwards": list(range(2 + total // 4, 2, -1)),
        "few runs": [*range(1, 2 + total // 8), *range(total // 2, total // 2 + total // 8)],
    }[order]
    slots = whole_pages(pages, page)
    first = world.host.alloc(page)
    expected = world.all_rows(world.device, slots)
    untouched = torch.ones(world.device.rows, dtype=torch.bool)
    untouched[slots] = False
    others = world.all_rows(world.device, untouched.nonzero().flatten())
    host, kept = world.saved(slots)
    assert torch.equal(kept, expected) and torch.equal(world.all_rows(world.host, host), expected)
    world.engine.load(1, host.flip(0), slots.flip(0))
    world.engine.drain()
    assert torch.equal(world.all_rows(world.device, slots), expected)
    assert torch.equal(world.all_rows(world.device, untouched.nonzero().flatten()), others)
    assert first is not None and not world.all_rows(world.host, first).any(), "a neighbour's host slots"
    assert world.engine.counters()["loaded_bytes"] == len(slots) * world.host.slot_bytes


@pytest.mark.parametrize(
    ("pages", "how"),
    [
        (list(range(3, 99)), "runs/{}"),
        ([*range(3, 43), *range(60, 100)], "runs/{}"),
        (list(range(99, 3, -1)), "index/{}"),
    ],
)
@pytest.mark.parametrize("page", [1, 2])
def test_runs_and_pages_are_found(pages: list[int], how: str, page: int) -> None:
    device = make_device(page=page)
    slots = whole_pages(pages, page)
    assert RowCopy(device, device, slots, torch.arange(len(slots))).how == how.format(page)
    for torn in (slots[1:], slots[:-1], slots[1 : 1 - page or None], slots[:-page].roll(1)):
        assert RowCopy(device, device, torn, torch.arange(len(torn))).how.endswith("/1")


@pytest.mark.parametrize("page", [1, 4])
def test_staging_of_scattered_device_slots(page: int) -> None:
    """What runs between host and GPU: the host side in runs, the device side by index. Here on the CPU."""
    world = World(page=page)
    device = whole_pages([9, 3, 30, 12, 2, 7, 1, 8], page)
    host = whole_pages([4, 5, 6, 1, 2, 11, 12, 13], page)
    runs = [(4, 3), (1, 2), (11, 3)]
    kept = world.all_rows(world.device, device)
    out, back = (
        RowCopy(world.device, world.host, device, host),
        RowCopy(world.host, world.device, host, device),
    )
    out._pairs = back._pairs = None
    out._host_runs = back._host_runs = runs
    out._index, back._index = out._gather, back._scatter  # type: ignore[method-assign]
    assert [out.copy_layer(layer) for layer in range(LAYERS)] == [2 * len(device)] * LAYERS
    assert torch.equal(world.all_rows(world.host, host), kept)
    world.overwrite(world.device, device, 0)
    assert [back.copy_layer(layer) for layer in range(LAYERS)] == [2 * len(device)] * LAYERS
    assert torch.equal(world.all_rows(world.device, device), kept)


def test_nothing_to_copy() -> None:
    world = World()
    nothing = torch.empty(0, dtype=torch.int64)
    world.engine.save(1, nothing, nothing)
    assert world.engine.poll() == [(1, True)]


# -- time -------------------------------------------------------------------------------------------


def test_layers_arrive_one_by_one() -> None:
    world = World()
    host, kept = world.saved(TEN)
    start = world.clock.now
    world.engine.load(1, host, TEN)
    for layer in range(LAYERS):
        world.clock.now = start + layer + 1.01
        assert (world.engine.poll() == [(1, True)]) == (layer == LAYERS - 1)
        for other in range(LAYERS):
            here = world.rows(world.device, TEN, other)
            assert torch.equal(here, kept[other] if other <= layer else torch.zeros_like(here))


def test_layer_0_is_usable_before_the_last_has_arrived() -> None:
    world = World()
    host, kept = world.saved(TEN)
    start, slept = world.clock.now, world.clock.slept
    world.engine.load(1, host, TEN)
    world.engine.fence([1])
    assert world.engine.consumer_index == 0
    for layer in range(LAYERS):
        assert world.engine.remaining_s(1, layer) == pytest.approx(1)
        world.engine.wait_until(layer)
        world.engine.wait_until(layer)
        assert world.clock.now - start == pytest.approx(layer + 1), "waited for this layer, no longer"
        assert torch.equal(world.rows(world.device, TEN, layer), kept[layer])
        if layer + 1 < LAYERS:
            assert not world.rows(world.device, TEN, layer + 1).any()
    assert world.engine.consumer_index == -1 and world.engine.poll() == [(1, True)]
    counters = world.engine.counters()
    assert counters["layer_waits"] == LAYERS
    assert counters["layer_wait_s"] == pytest.approx(world.clock.slept - slept)


def test_compute_hides_the_link() -> None:
    world = World()
    host, kept = world.saved(TEN)
    world.engine.load(1, host, TEN)
    world.engine.fence([1])
    slept = world.clock.slept
    for layer in range(LAYERS):
        world.clock.now += 1.5  # computing takes longer than a layer of the link
        world.engine.wait_layer(layer)
        assert torch.equal(world.rows(world.device, TEN, layer), kept[layer])
    assert world.clock.slept == slept and world.engine.counters()["layer_waits"] == 0


def test_without_a_fence_the_bytes_are_wrong() -> None:
    """Negative control: what the other tests see is not copied too early."""
    world = World()
    host, kept = world.saved(TEN)
    world.engine.load(1, host, TEN)
    world.engine.wait_layer(LAYERS - 1)
    assert not torch.equal(world.all_rows(world.device, TEN), kept)
    world.engine.fence([1])
    world.engine.wait_layer(LAYERS - 1)
    assert torch.equal(world.all_rows(world.device, TEN), kept)


def test_a_fence_is_for_one_batch_and_these_loads() -> None:
    world = World()
    host, _ = world.saved(TEN)
    other, _ = world.saved(NEXT)
    world.engine.load(1, host, TEN)
    world.engine.load(2, other, NEXT)
    slept = world.clock.slept
    world.engine.fence([1])
    world.engine.wait_layer(LAYERS - 1)
    assert world.clock.slept - slept == pytest.approx(LAYERS), "not for the second load"
    world.engine.fence([2])
    world.engine.fence([1])
    world.engine.wait_layer(LAYERS - 1)
    assert world.clock.slept - slept == pytest.approx(LAYERS), "the next fence replaces the last"
    assert world.engine.in_flight == [1, 2]


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
        world.engine.settle(TEN[3:4])
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
    world.engine.settle(NEXT)
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


# -- the end, and the counting --------------------------------------------------------------------------


def test_cancel() -> None:
    world = World()
    world.engine.save(1, TEN, torch.arange(10))
    world.engine.release_after(1)
    world.engine.load(2, torch.arange(10), NEXT)
    world.engine.fence([2])
    assert world.engine.cancel_all() == [1, 2]
    world.clock.now += 100
    world.engine.before_forward()
    world.engine.wait_layer(LAYERS - 1)
    assert world.clock.slept == 0 and world.engine.poll() == [] and world.engine.in_flight == []
    assert not world.engine.reading | world.engine.writing
    assert not world.engine.host_reading | world.engine.host_writing
    assert not world.all_rows(world.host, torch.arange(10)).any()
    world.engine.save(1, TEN, torch.arange(10))
    assert world.engine.wait(1)


def test_counters_and_bandwidths() -> None:
    world = World()
    assert world.engine.bandwidth(LOAD) == 0
    host, _ = world.saved(TEN)
    for transfer in range(5):
        world.engine.load(transfer, host, TEN)
        world.engine.drain()
    counters = world.engine.counters()
    size = 10 * LAYERS * sum(world.device.row_bytes)
    assert (counters["loads"], counters["loaded_bytes"]) == (5, 5 * size)
    assert (counters["saves"], counters["saved_bytes"]) == (1, size)
    assert counters["load_bytes_s"] == pytest.approx(world.link.bytes_s)
    assert counters["save_bytes_s"] == world.engine.bandwidth(SAVE) == pytest.approx(world.link.bytes_s)
    real = TransferEngine(world.device, world.host, None)
    real.load(1, host, TEN)
    assert real.poll() == [(1, True)] and real.bandwidth(LOAD) > 1e6


def test_poll_is_cheap_when_idle() -> None:
    engine = World().engine
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(1000):
            engine.poll()
            engine.before_forward()
            engine.wait_layer(0)
        best = min(best, (time.perf_counter() - start) / 1000)
    assert best < 20e-6, f"{best * 1e6:.1f} us"


@pytest.mark.parametrize("page", [1, 4])
def test_random_traffic_against_a_model(page: int) -> None:
    """Two tiers of numbered contents; overwrites happen only where the engine's order allows them."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    world = World(page=page, verify=True)
    pages = {"device": 256 // page, "host": 128 // page}
    content = {
        "device": world.all_rows(world.device, torch.arange(256)),
        "host": world.all_rows(world.host, torch.arange(128)),
    }
    started, reported = 0, 0
    for step in range(400):
        move = rng.random()
        if move < 0.5:
            count = rng.randrange(1, 8)
            device = whole_pages(rng.sample(range(pages["device"]), count), page)
            host = whole_pages(rng.sample(range(pages["host"]), count), page)
            load = rng.random() < 0.5
            try:
                if load:
                    world.engine.load(step, host, device)
                else:
                    world.engine.save(step, device, host)
            except TransferError as error:
                assert "in use" in str(error)
                continue
            started += 1
            if load:
                content["device"][:, device] = content["host"][:, host]
            else:
                content["host"][:, host] = content["device"][:, device]
                if rng.random() < 0.5:
                    world.engine.release_after(step)
        elif move < 0.6 and world.engine.in_flight:
            world.engine.fence(rng.sample(world.engine.in_flight, 1))
            world.engine.wait_layer(rng.randrange(LAYERS))
        elif move < 0.8:
            world.clock.now += rng.random() * 3
            reported += len(world.engine.poll())
        else:
            slots = torch.tensor(rng.sample(range(256), 5))
            world.engine.settle(slots)
            world.overwrite(world.device, slots, step % 256)
            content["device"][:, slots] = step % 256
    world.engine.drain()
    ends = world.engine.poll()
    assert reported + len(ends) == started > 50 and all(ok for _, ok in ends)
    assert torch.equal(content["device"], world.all_rows(world.device, torch.arange(256)))
    assert torch.equal(content["host"], world.all_rows(world.host, torch.arange(128)))


# -- CUDA: the order of what is queued, on recorded streams -----------------------------------------------


class Recorded:
    """Stands for ``torch.cuda``: streams and events that write down what they are told, and copy at once."""

    def __init__(self) -> None:
        self.log: list[tuple[str, ...]] = []
        self.ready = True
        self.active = "current"
        self.events = 0
        self.streams = 0

    def Stream(self) -> _Stream:
        self.streams += 1
        return _Stream(self, ("load", "save")[self.streams - 1])

    def Event(self, enable_timing: bool = False) -> _Event:
        self.events += 1
        return _Event(self, f"e{self.events}")

    def current_stream(self) -> _Stream:
        return _Stream(self, self.active)

    def stream(self, stream: _Stream) -> _Active:
        return _Active(self, stream.name)


class _Stream:
    def __init__(self, api: Recorded, name: str) -> None:
        self.api, self.name = api, name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream) and other.name == self.name

    def wait_stream(self, other: _Stream) -> None:
        self.api.log.append((self.name, "wait_stream", other.name))

    def wait_event(self, event: _Event) -> None:
        self.api.log.append((self.name, "wait", event.name))

    def synchronize(self) -> None:
        self.api.log.append((self.name, "synchronize"))


class _Event:
    def __init__(self, api: Recorded, name: str) -> None:
        self.api, self.name = api, name

    def record(self, stream: _Stream) -> None:
        self.api.log.append((stream.name, "record", self.name))

    def query(self) -> bool:
        return self.api.ready

    def synchronize(self) -> None:
        self.api.log.append(("cpu", "synchronize", self.name))
        self.api.ready = True

    def elapsed_time(self, end: _Event) -> float:
        return 2.0  # ms


class _Active:
    def __init__(self, api: Recorded, name: str) -> None:
        self.api, self.name = api, name

    def __enter__(self) -> None:
        self.before, self.api.active = self.api.active, self.name

    def __exit__(self, *_: object) -> None:
        self.api.active = self.before


def cuda_world(fault: Faulty | None = None) -> tuple[World, Recorded]:
    world, api = World(link=False), Recorded()

    def copy_layer(plan: RowCopy, layer: int) -> int:
        api.log.append((api.active, "copy", str(layer)))
        return fault(plan, layer) if fault else plan.copy_layer(layer)

    world.engine = TransferEngine(
        world.device, world.host, None, _Stream(api, "forward"), copy_layer=copy_layer, streams=api
    )
    return world, api


LAUNCH = [
    ("{0}", "wait_stream", "current"),
    ("{0}", "wait_stream", "forward"),
    ("{0}", "record", "e{1}"),
    ("{0}", "copy", "0"),
    ("{0}", "record", "e{2}"),
    ("{0}", "copy", "1"),
    ("{0}", "record", "e{3}"),
    ("{0}", "copy", "2"),
    ("{0}", "record", "e{4}"),
]


def launched(stream: str, first: int, after: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    numbers = range(first, first + 4)
    log = [tuple(part.format(stream, *numbers) for part in entry) for entry in LAUNCH]
    return log[:2] + [(stream, "wait", event) for event in after] + log[2:]


def test_cuda_copies_are_queued_behind_the_batch_and_layer_by_layer() -> None:
    world, api = cuda_world()
    world.engine.load(1, torch.arange(10), TEN)
    assert api.log == launched("load", 1)
    api.ready = False
    assert world.engine.poll() == []
    world.engine.fence([1])
    api.log.clear()
    world.engine.wait_layer(0)
    world.engine.wait_layer(0)
    world.engine.wait_layer(2)
    assert api.log == [
        ("current", "wait", "e2"),
        ("forward", "wait", "e2"),
        ("current", "wait", "e4"),
        ("forward", "wait", "e4"),
    ], "only the compute streams wait"
    assert world.engine.consumer_index == -1 and world.engine.poll() == []
    api.ready = True
    assert world.engine.poll() == [(1, True)]
    size = 10 * world.host.slot_bytes
    assert world.engine.bandwidth(LOAD) == pytest.approx(size / 2e-3)


def test_cuda_every_batch_waits_anew() -> None:
    world, api = cuda_world()
    world.engine.load(1, torch.arange(10), TEN)
    api.ready = False
    for _ in range(2):
        world.engine.fence([1])
        api.log.clear()
        world.engine.wait_layer(1)
        assert ("current", "wait", "e3") in api.log


def test_cuda_order_of_released_saves() -> None:
    world, api = cuda_world()
    api.ready = False
    world.engine.save(1, TEN, torch.arange(10))
    world.engine.release_after(1)
    world.engine.load(2, torch.arange(10, 20), TEN)
    assert api.log == launched("save", 1) + launched("load", 5, after=("e4",))
    api.log.clear()
    world.engine.before_forward()
    world.engine.before_forward()
    assert api.log == [("current", "wait", "e4"), ("forward", "wait", "e4")], "no blocking of the CPU"
    world.engine.drain()
    assert world.engine.poll() == [(1, True), (2, True)]


def test_cuda_failure_at_launch_waits_for_what_was_queued() -> None:
    world, api = cuda_world(Faulty(1, 1))
    with pytest.raises(TransferError, match="planted"):
        world.engine.load(1, torch.arange(10), TEN)
    assert api.log[-1] == ("load", "synchronize") and not world.engine.in_flight
    assert not world.engine.writing


def test_cuda_cancel_waits_for_what_is_queued() -> None:
    world, api = cuda_world()
    api.ready = False
    world.engine.load(1, torch.arange(10), TEN)
    assert world.engine.cancel_all() == [1] and api.log[-1] == ("cpu", "synchronize", "e4")


def test_cuda_takes_no_emulated_link() -> None:
    world, api = cuda_world()
    with pytest.raises(ValueError, match="--elora-link-gbps"):
        TransferEngine(world.device, world.host, Link(1), streams=api)


@pytest.mark.parametrize("place", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("page", [1, 16])
def test_round_trip_where_the_device_is(page: int, place: str) -> None:
    """On a machine with a GPU: real streams, pinned memory, scattered device slots."""
    cpu = make_device(page=page)
    rows = [[cpu.byte_rows(layer, s).clone() for layer in range(LAYERS)] for s in (0, 1)]
    device = UnifiedPool(*([r[:, None].to(place) for r in part] for part in rows), page_size=page)
    host = HostPool(128, device, pin=True)
    assert host.pinned == (place == "cuda")
    stream = torch.cuda.Stream() if place == "cuda" else None
    engine = TransferEngine(device, host, None, stream, verify=True)
    slots = whole_pages(torch.randperm(256 // page)[: 64 // page].tolist(), page).to(place)
    copies = host.alloc(64)
    assert copies is not None
    engine.save(1, slots, copies)
    engine.drain()
    for layer in range(LAYERS):
        for s in (0, 1):
            device.byte_rows(layer, s)[slots] = 0
    engine.load(2, copies, slots)
    engine.fence([2])
    for layer in range(LAYERS):
        engine.wait_layer(layer)
        for s in (0, 1):
            assert torch.equal(device.byte_rows(layer, s).cpu(), rows[s][layer])
    engine.drain()
    assert engine.poll() == [(1, True), (2, True)]
    host.close()
