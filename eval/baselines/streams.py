"""Streams and events of a CPU on which copies between host and device take time.

``torch.cpu`` has streams and events that do nothing: a copy is over before the next line runs, and no wait ever
waits. Here a stream knows *when* what was put on it is done, copies put on it take as long as the emulated link
needs, and an event is reached when its stream is. The compute stream is the calling thread itself, so that what
waits for an event on it sleeps, as a GPU's compute stream would stand still. SGLang's own code then overlaps
exactly what it would overlap on a GPU, and blocks where it would block.

The bytes themselves are copied at once; only what is *late* is emulated.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Event:
    """A point on a stream; before :meth:`record` it has been reached."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._at = 0.0

    def record(self, stream: Any = None) -> None:
        """Stand after everything that is on ``stream`` (default: the current one) now."""
        self._at = (self._device.current_stream() if stream is None else stream).done_at

    def query(self) -> bool:
        """Whether the point has been reached."""
        return self._device.now() >= self._at

    def synchronize(self) -> None:
        """Sleep until the point is reached."""
        self._device.sleep_until(self._at)

    def wait(self, stream: Any = None) -> None:
        """Let ``stream`` (default: the current one) go on no earlier than this point."""
        (self._device.current_stream() if stream is None else stream).wait_event(self)

    @property
    def at(self) -> float:
        """Second at which the point is reached, by the device's clock."""
        return self._at


class Stream:
    """A queue of copies; ``done_at`` is the second at which all of them are done."""

    def __init__(self, device: Device, compute: bool = False) -> None:
        self._device = device
        self._compute = compute
        self.done_at = 0.0

    def wait_event(self, event: Any) -> None:
        """Nothing put on this stream from now on starts before ``event``; the compute stream sleeps."""
        self._not_before(getattr(event, "at", 0.0))

    def wait_stream(self, other: Any) -> None:
        """The same for everything that is on ``other`` now."""
        self._not_before(getattr(other, "done_at", 0.0))

    def record_event(self, event: Event | None = None) -> Event:
        """An event after everything on this stream."""
        event = event or Event(self._device)
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Sleep until everything on this stream is done."""
        self._device.sleep_until(self.done_at)

    def put(self, done_at: float) -> None:
        """Put a copy on this stream that is done at ``done_at``; the compute stream sleeps until then."""
        self._not_before(done_at)

    def _not_before(self, at: float) -> None:
        if self._compute:
            self._device.sleep_until(at)
        else:
            self.done_at = max(self.done_at, at)


class Device:
    """What SGLang calls ``device_module``: like ``torch.cpu``, with streams on which copies take time.

    Args:
        schedule: ``(direction, bytes, earliest second) -> second at which the copy is done``; the link model.
    """

    __name__ = "elora_sglang.eval.baselines.streams"

    def __init__(
        self,
        schedule: Callable[[str, int, float], float],
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.now = now
        self._sleep = sleep
        self._schedule = schedule
        self._compute = Stream(self, compute=True)
        self._current = self._compute
        self.moved = {"load": 0, "save": 0}
        self.copies = {"load": 0, "save": 0}
        #: Adapters copied into a slot buffer.
        self.adapters = 0
        self.slept = 0.0

    def copy(self, direction: str, size: int) -> None:
        """Put a copy of ``size`` bytes on the current stream; ``direction`` is ``load`` (to the device) or ``save``."""
        stream = self._current
        earliest = max(self.now(), stream.done_at)
        self.moved[direction] += size
        self.copies[direction] += 1
        stream.put(self._schedule(direction, size, earliest))

    def sleep_until(self, at: float) -> None:
        """Stand still until ``at``."""
        left = at - self.now()
        if left > 0:
            self.slept += left
            self._sleep(left)

    def Stream(self, *args: Any, **kwargs: Any) -> Stream:
        return Stream(self)

    def Event(self, *args: Any, **kwargs: Any) -> Event:
        if kwargs.get("enable_timing"):
            raise NotImplementedError("events of the emulated link keep no time")
        return Event(self)

    def current_stream(self, *args: Any) -> Any:
        return self._current

    def stream(self, stream: Any) -> StreamContext:
        """Context in which ``stream`` is the current one; may be entered again and again."""
        return StreamContext(self, stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def switch(self, stream: Any) -> Any:
        """Make ``stream`` the current one, the compute stream where it is none of ours; returns what was before."""
        before, self._current = self._current, stream if isinstance(stream, Stream) else self._compute
        return before


class StreamContext:
    """``with device.stream(s):``; SGLang's adapter loader keeps one and enters it for every load."""

    def __init__(self, device: Device, stream: Any) -> None:
        self._device, self._stream = device, stream
        self._before: list[Any] = []

    def __enter__(self) -> None:
        self._before.append(self._device.switch(self._stream))

    def __exit__(self, *error: Any) -> None:
        self._device.switch(self._before.pop())
