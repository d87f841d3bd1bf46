"""Emulated streams: what overlaps, what waits, in whose queue; with a clock that only sleep moves."""

from __future__ import annotations

import pytest

from elora_sglang.eval.baselines.streams import Device
from elora_sglang.runtime.transfers.link import Link


class Clock:
    def __init__(self) -> None:
        self.at = 100.0

    def now(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def device(clock: Clock) -> Device:
    link = Link(1.0)
    return Device(
        lambda direction, size, earliest: link.issue(direction, [size], earliest)[0],
        now=clock.now,
        sleep=clock.sleep,
    )


SECOND = 10**9  # bytes that the link of 1 GB/s moves in a second


def test_a_copy_on_the_compute_stream_blocks(device: Device, clock: Clock) -> None:
    device.copy("load", 2 * SECOND)
    assert clock.at == pytest.approx(102.0)
    assert device.moved == {"load": 2 * SECOND, "save": 0}


def test_a_copy_on_its_own_stream_is_late_but_blocks_nobody(device: Device, clock: Clock) -> None:
    with device.stream(device.Stream()):
        device.copy("load", SECOND)
        event = device.Event()
        event.record()
    assert clock.at == 100.0
    assert not event.query()
    clock.sleep(0.5)
    device.current_stream().wait_event(event)
    assert clock.at == pytest.approx(101.0)
    assert event.query()


def test_layers_arrive_one_after_the_other(device: Device, clock: Clock) -> None:
    events = []
    with device.stream(device.Stream()):
        for _ in range(4):
            device.copy("load", SECOND)
            events.append(device.Event())
            events[-1].record()
    for layer, event in enumerate(events):
        device.current_stream().wait_event(event)
        assert clock.at == pytest.approx(101.0 + layer)


def test_directions_do_not_wait_for_each_other_and_streams_of_one_do(device: Device) -> None:
    done = {}
    for name, direction in (("a", "load"), ("b", "load"), ("c", "save")):
        stream = device.Stream()
        with device.stream(stream):
            device.copy(direction, SECOND)
        done[name] = stream.done_at
    assert done == pytest.approx({"a": 101.0, "b": 102.0, "c": 101.0})


def test_a_stream_that_waits_for_another_starts_after_it(device: Device) -> None:
    first, second = device.Stream(), device.Stream()
    with device.stream(first):
        device.copy("save", 3 * SECOND)
    second.wait_stream(first)
    with device.stream(second):
        device.copy("load", SECOND)
    assert second.done_at == pytest.approx(104.0)


def test_a_context_may_be_entered_again(device: Device) -> None:
    context = device.stream(device.Stream())
    for _ in range(2):
        with context:
            assert device.current_stream() is not None
    assert device.current_stream() is device.current_stream()


def test_without_a_link_nothing_waits(clock: Clock) -> None:
    link = Link(0.0)
    free = Device(lambda d, size, at: link.issue(d, [size], at)[0], now=clock.now, sleep=clock.sleep)
    free.copy("load", SECOND)
    assert clock.at == 100.0
