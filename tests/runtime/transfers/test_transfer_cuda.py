"""The order of what is queued on CUDA streams, on recorded ones; and real ones where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from support.transfer_world import LAYERS, TEN, Faulty, World, make_device, whole_pages

from elora_sglang.runtime.pool.host import HostPool
from elora_sglang.runtime.pool.views import UnifiedPool
from elora_sglang.runtime.transfers.engine import TransferEngine, TransferError
from elora_sglang.runtime.transfers.link import LOAD, Link
from elora_sglang.runtime.transfers.row_copy import RowCopy


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
