"""How copies are executed: at once or behind an emulated link on a CPU, on streams of their own on CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from elora_sglang.runtime.transfers.link import LOAD, SAVE, Link
from elora_sglang.runtime.transfers.row_copy import RowCopy

#: Copies one layer and returns the rows written, K and V together.
CopyLayer = Callable[[RowCopy, int], int]


class TransferError(RuntimeError):
    """A copy between the tiers failed; what it should have written must not be used."""


@dataclass(slots=True, eq=False)
class Copy:
    """One transfer in flight. ``plan`` copies ``layers`` layers of ``layer_bytes`` bytes each."""

    id: int
    serial: int
    direction: str
    source_slots: torch.Tensor
    target_slots: torch.Tensor
    plan: RowCopy
    layers: int
    layer_bytes: int
    after: list[Copy]
    released: bool = False
    done: bool = False
    failed: str | None = None
    #: layers copied (CPU) or queued (CUDA)
    copied: int = 0
    faults: int = 0
    #: seconds the link was busy with it; known when done
    seconds: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    #: CUDA: layers that the compute stream was told to wait for
    awaited: int = 0

    @property
    def over(self) -> bool:
        return self.done or self.failed is not None

    @property
    def name(self) -> str:
        return f"{self.direction} {self.id}"


class Runner(Protocol):
    """Executes copies. All methods may set ``done`` or ``failed``; only ``launch`` raises."""

    retries: int

    def launch(self, copy: Copy) -> None:
        """Start. Raises whatever the copying raised; nothing runs on then."""

    def advance(self, copy: Copy) -> None:
        """Take note of what has arrived, without waiting."""

    def need(self, copy: Copy, layers: int) -> bool:
        """What is computed next uses the first ``layers`` layers. Returns whether it had to wait."""

    def finish(self, copy: Copy) -> None:
        """Block until it is over."""

    def remaining_s(self, copy: Copy, layers: int) -> float:
        """Seconds until the first ``layers`` layers have arrived, as far as known."""


class CpuRunner:
    """Copies by torch. With a link, a layer's bytes move when the link has delivered it (seen by
    ``advance``) or when somebody waits for it: reading too early, or reusing a slot too early, yields
    wrong bytes here as it would on a GPU."""

    def __init__(
        self,
        link: Link,
        copy_layer: CopyLayer,
        verify: bool,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._link, self._copy_layer, self._verify = link, copy_layer, verify
        self._clock, self._sleep = clock, sleep
        self.retries = 0

    def launch(self, copy: Copy) -> None:
        now = self._clock()
        if self._link.gbps:
            arrivals = self._link.issue(copy.direction, [copy.layer_bytes] * copy.layers, now)
            for other in copy.after:  # what is still to be read or written there comes first
                arrivals = [max(own, its) for own, its in zip(arrivals, other.arrivals, strict=True)]
            copy.arrivals = arrivals
            return
        copy.arrivals = [now] * copy.layers
        while copy.copied < copy.layers:
            self._one(copy)
        copy.seconds = self._clock() - now
        copy.done = True

    def advance(self, copy: Copy) -> None:
        now = self._clock()
        while not copy.over and copy.copied < copy.layers and copy.arrivals[copy.copied] <= now:
            if not self._try(copy):
                return

    def need(self, copy: Copy, layers: int) -> bool:
        if copy.over or copy.copied >= layers:
            return False
        wait = copy.arrivals[layers - 1] - self._clock()
        if wait > 0:
            self._sleep(wait)
        while not copy.over and copy.copied < layers:
            self._try(copy)
        return wait > 0

    def finish(self, copy: Copy) -> None:
        self.need(copy, copy.layers)

    def remaining_s(self, copy: Copy, layers: int) -> float:
        if copy.over or copy.copied >= layers:
            return 0.0
        return max(0.0, copy.arrivals[layers - 1] - self._clock())

    def _try(self, copy: Copy) -> bool:
        """Copy the next layer; a first failure is tried again later, a second one fails the transfer."""
        for other in copy.after:
            while not other.over and other.copied <= copy.copied:
                self._try(other)
            if other.failed is not None:
                copy.failed = f"{copy.name} follows a failed copy: {other.failed}"
                return False
        try:
            self._one(copy)
        except Exception as error:
            copy.faults += 1
            if copy.faults > 1:
                copy.failed = f"{copy.name}, layer {copy.copied}: {error}"
            else:
                self.retries += 1
            return False
        if copy.copied == copy.layers:
            copy.seconds = copy.layer_bytes * copy.layers / self._link.bytes_s
            copy.done = True
        return True

    def _one(self, copy: Copy) -> None:
        rows = self._copy_layer(copy.plan, copy.copied)
        if rows != 2 * copy.plan.slots:
            raise TransferError(f"short copy: {rows} of {2 * copy.plan.slots} rows were written")
        if self._verify and not copy.plan.same(copy.copied):
            raise TransferError("the bytes that arrived are not those that were sent")
        copy.copied += 1


class CudaRunner:
    """One stream per direction. A copy is queued behind everything that the forward stream and the current
    stream were given so far (they may still use the slots) and behind the copies it follows; then one
    event per layer is recorded. Nothing here blocks the CPU but ``finish``.

    Args:
        streams: the module with Stream, Event, stream(), current_stream(): ``torch.cuda``.
        forward: gives the stream that batches run on, or None.
    """

    def __init__(
        self, copy_layer: CopyLayer, verify: bool, streams: Any, forward: Callable[[], Any | None]
    ) -> None:
        self._copy_layer, self._verify, self._api, self._forward = copy_layer, verify, streams, forward
        self._streams = {LOAD: streams.Stream(), SAVE: streams.Stream()}
        self._started: dict[int, Any] = {}
        self.retries = 0

    def launch(self, copy: Copy) -> None:
        stream = self._streams[copy.direction]
        stream.wait_stream(self._api.current_stream())
        forward = self._forward()
        if forward is not None:
            stream.wait_stream(forward)
        try:
            with self._api.stream(stream):
                for other in copy.after:
                    stream.wait_event(other.events[-1])
                start = self._api.Event(enable_timing=True)
                start.record(stream)
                for layer in range(copy.layers):
                    rows = self._copy_layer(copy.plan, layer)
                    if rows != 2 * copy.plan.slots:
                        raise TransferError(f"short copy: {rows} of {2 * copy.plan.slots} rows were written")
                    event = self._api.Event(enable_timing=layer == copy.layers - 1)
                    event.record(stream)
                    copy.events.append(event)
                    copy.copied += 1
        except Exception:
            stream.synchronize()  # what was queued already must not run on into slots that are given back
            raise
        self._started[copy.serial] = start

    def advance(self, copy: Copy) -> None:
        if not copy.over and copy.events[-1].query():
            self._conclude(copy)

    def need(self, copy: Copy, layers: int) -> bool:
        if copy.over or copy.awaited >= layers:
            return False
        event = copy.events[layers - 1]
        copy.awaited = layers
        current, forward = self._api.current_stream(), self._forward()
        current.wait_event(event)
        if forward is not None and forward != current:
            forward.wait_event(event)
        return not event.query()

    def finish(self, copy: Copy) -> None:
        if not copy.over:
            copy.events[-1].synchronize()
            self._conclude(copy)

    def remaining_s(self, copy: Copy, layers: int) -> float:
        return 0.0

    def _conclude(self, copy: Copy) -> None:
        start = self._started.pop(copy.serial, None)
        if start is not None:
            copy.seconds = start.elapsed_time(copy.events[-1]) / 1e3
        if any(other.failed for other in copy.after):
            copy.failed = f"{copy.name} follows a failed copy"
        elif self._verify and not all(copy.plan.same(layer) for layer in range(copy.layers)):
            copy.failed = f"{copy.name}: the bytes that arrived are not those that were sent"
        else:
            copy.done = True
