"""Copies between the tiers: exact bytes, late when the link says so, counted; random traffic."""

from __future__ import annotations

import random

import pytest
import torch
from support.transfer_world import LAYERS, NEXT, TEN, World, make_device, whole_pages
from torch.utils._python_dispatch import TorchDispatchMode

from elora_sglang.runtime.transfers.engine import TransferEngine, TransferError
from elora_sglang.runtime.transfers.link import LOAD, SAVE
from elora_sglang.runtime.transfers.row_copy import Gathered, RowCopy, Scattered, Units

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
    kept = world.all_rows(world.device, device)
    ends, ends_back = (world.device, world.host, device, host), (world.host, world.device, host, device)
    out = RowCopy(*ends, way=Gathered(Units.of(*ends), world.device))
    back = RowCopy(*ends_back, way=Scattered(Units.of(*ends_back), world.device))
    assert out.how == back.how == f"staged/{page}"
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


# -- the end, and the counting --------------------------------------------------------------------------


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


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_idle_calls_of_every_iteration_touch_no_tensor() -> None:
    world = World()
    with Operations() as idle:
        for _ in range(3):
            world.engine.poll()
            world.engine.before_forward()
            world.engine.wait_layer(0)
    assert idle.count == 0
    with Operations() as busy:
        world.engine.load(1, TEN, NEXT)
    assert busy.count > 0, "the counter sees what a copy does"


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
            world.engine.wait_for_slots(slots)
            world.overwrite(world.device, slots, step % 256)
            content["device"][:, slots] = step % 256
    world.engine.drain()
    ends = world.engine.poll()
    assert reported + len(ends) == started > 50 and all(ok for _, ok in ends)
    assert torch.equal(content["device"], world.all_rows(world.device, torch.arange(256)))
    assert torch.equal(content["host"], world.all_rows(world.host, torch.arange(128)))
