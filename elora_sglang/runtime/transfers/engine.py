"""Copies between the device and the host tier: asynchronous, layer by layer, fenced, never wrong bytes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from elora_sglang.runtime.pool.host import HostPool
from elora_sglang.runtime.pool.views import UnifiedPool
from elora_sglang.runtime.transfers.inflight import SlotsInFlight
from elora_sglang.runtime.transfers.link import LOAD, SAVE, Link
from elora_sglang.runtime.transfers.meter import TransferMeter
from elora_sglang.runtime.transfers.row_copy import RowCopy
from elora_sglang.runtime.transfers.runners import (
    Copy,
    CopyLayer,
    CpuRunner,
    CudaRunner,
    Runner,
    TransferError,
)

__all__ = ["TransferEngine", "TransferError"]

#: Failed transfers that are remembered, so that fencing one raises.
REMEMBERED = 4096


class TransferEngine:
    """Moves slots between the tiers. For one thread (the scheduler's).

    A transfer is known by the caller's id. Slot i of the first list goes to slot i of the second; an
    adapter's lists must be ascending on both sides (its bytes lie in ascending slot order). Order is kept where
    transfers meet: a load of host slots that a save still writes, a save of device slots that a load still
    writes, and a load into device slots of a released save all come after it. Everything else that meets is
    refused.

    Around a forward pass: ``fence`` the loads the batch uses, ``before_forward``, and ``wait_layer`` where
    a layer's slots are read. The engine has the shape of SGLang's layer counter (``wait_until``,
    ``consumer_index``, ``num_layers``), so the KV pool can be given the engine itself.

    Args:
        device, host: the tiers.
        link: emulated link; CPU only. None or 0 GB/s: as fast as memory.
        forward_stream: CUDA stream of the batches; may be set later.
        verify: compare both sides of every copy (slow; for tests and the auditor).
        copy_layer: replaces the copying of one layer, for fault tests.
        clock, sleep: time in seconds, for tests.
        streams: the CUDA stream module, for tests.

    Raises:
        ValueError: a link with a device pool on CUDA.
    """

    def __init__(
        self,
        device: UnifiedPool,
        host: HostPool,
        link: Link | None = None,
        forward_stream: Any | None = None,
        *,
        verify: bool = False,
        copy_layer: CopyLayer = RowCopy.copy_layer,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
        streams: Any | None = None,
    ) -> None:
        self.device, self.host = device, host
        self.link = link or Link(0)
        self.forward_stream = forward_stream
        self.num_layers = device.num_layers
        self._clock = clock
        self._runner: Runner
        if streams is not None or device.device.type == "cuda":
            if self.link.gbps:
                raise ValueError("elora: --elora-link-gbps emulates a link on a CPU; on CUDA it must be 0")
            self._runner = CudaRunner(copy_layer, verify, streams or torch.cuda, lambda: self.forward_stream)
        else:
            self._runner = CpuRunner(self.link, copy_layer, verify, clock, sleep)
        self._on_device = SlotsInFlight(device.rows)
        self._on_host = SlotsInFlight(host.rows)
        self._copies: dict[int, Copy] = {}  # by id, in launch order
        self._serial = 0
        self._fenced: list[Copy] = []
        self._released: list[Copy] = []
        self._reports: list[tuple[int, bool]] = []
        self._failed: dict[int, str] = {}
        self._failed_order: deque[int] = deque()
        self._meter = TransferMeter()

    # -- starting ---------------------------------------------------------------------------------

    def load(self, transfer: int, host_slots: torch.Tensor, device_slots: torch.Tensor) -> None:
        """Start copying host slots into device slots, all layers, layer 0 first.

        Args:
            transfer: an id that is not in flight.
            host_slots, device_slots: int64 ``[n]`` on any device.

        Raises:
            TransferError: lengths differ, a slot is outside its tier or written twice, slots in flight in a
                way that cannot be ordered, or the copying failed. Nothing is in flight then; the device slots
                may hold part of the bytes.
        """
        self._launch(LOAD, transfer, host_slots, device_slots)

    def save(self, transfer: int, device_slots: torch.Tensor, host_slots: torch.Tensor) -> None:
        """Start copying device slots into host slots. As :meth:`load`."""
        self._launch(SAVE, transfer, device_slots, host_slots)

    def release_after(self, transfer: int) -> None:
        """The device slots of this save are given away now, although they are still read.

        ``before_forward`` and loads into these slots wait for it; whoever else writes there calls
        :meth:`wait_for_slots` first. A transfer that is over already is ignored.
        """
        copy = self._copies.get(transfer)
        if copy is not None and not copy.over and not copy.released:
            copy.released = True
            self._released.append(copy)

    # -- completing -------------------------------------------------------------------------------

    def poll(self) -> list[tuple[int, bool]]:
        """``(transfer, ok)`` of those that ended since the last call, in launch order. Never waits."""
        if self._copies:
            self._collect()
        if not self._reports:
            return []
        reports, self._reports = self._reports, []
        return reports

    def fence(self, transfers: Iterable[int]) -> None:
        """The next batch uses these loads: ``wait_layer`` waits for them, and for no others any more.

        Ids that completed are ignored.

        Raises:
            TransferError: one of them failed.
        """
        fenced = []
        for transfer in transfers:
            copy = self._copies.get(transfer)
            if copy is None and transfer in self._failed:
                raise TransferError(f"elora: the batch uses a failed copy: {self._failed[transfer]}")
            if copy is not None and not copy.done:
                copy.awaited = 0
                fenced.append(copy)
        self._fenced = fenced

    def before_forward(self, written: torch.Tensor | None = None) -> None:
        """Call before a batch is launched: it may write slots whose bytes a released save still reads.

        Waits (on CUDA: makes the forward and the current stream wait) for released saves; when
        ``written``, the slots that the batch writes, is given on the CPU: only for those that read one of them.
        """
        if self._released:
            self._wait_released(written)

    def wait_for_slots(self, slots: torch.Tensor) -> None:
        """Wait for every copy that reads or writes one of these device slots: they are about to be
        written by other means than a batch or a load. On CUDA only the current and the forward stream wait."""
        slots = _on_cpu(slots)
        if self._copies and (self._on_device.read(slots) or self._on_device.writers(slots)):
            for copy in self._meeting(slots):
                self._runner.need(copy, self.num_layers)

    def wait_layer(self, layer: int) -> None:
        """Wait until the fenced loads have brought layers 0 to ``layer``. On CUDA only the current and the
        forward stream wait.

        Raises:
            TransferError: a fenced load failed; the batch must not go on.
        """
        if not self._fenced:
            return
        started, waits = self._clock(), 0
        for copy in self._fenced:
            waits += self._runner.need(copy, layer + 1)
            if copy.failed is not None:
                raise TransferError(f"elora: the batch uses a failed copy: {copy.failed}")
        if waits:
            self._meter.waited("layer", waits, self._clock() - started)
        if layer + 1 == self.num_layers or all(copy.done for copy in self._fenced):
            self._fenced = []

    #: SGLang's name for it (``LayerDoneCounter`` in ``managers/cache_controller.py``).
    wait_until = wait_layer

    @property
    def consumer_index(self) -> int:
        """0 while a batch has fenced loads, else -1: SGLang's sign for "nothing to wait for"."""
        return 0 if self._fenced else -1

    def wait(self, transfer: int) -> bool:
        """Block until this transfer is over. Returns whether it went well; ``poll`` still reports it."""
        copy = self._copies.get(transfer)
        if copy is None:
            return transfer not in self._failed
        self._runner.finish(copy)
        return copy.done

    def drain(self) -> None:
        """Block until nothing is in flight. ``poll`` still reports."""
        for copy in list(self._copies.values()):
            self._runner.finish(copy)
        self._collect()
        self._fenced, self._released = [], []

    # -- looking ----------------------------------------------------------------------------------

    @property
    def in_flight(self) -> list[int]:
        """Ids that ``poll`` has not reported yet, in launch order."""
        return list(self._copies)

    @property
    def reading(self) -> frozenset[int]:
        """Device slots that saves in flight read."""
        return self._on_device.reading()

    @property
    def writing(self) -> frozenset[int]:
        """Device slots that loads in flight write."""
        return self._on_device.writing()

    @property
    def host_reading(self) -> frozenset[int]:
        """Host slots that loads in flight read."""
        return self._on_host.reading()

    @property
    def host_writing(self) -> frozenset[int]:
        """Host slots that saves in flight write."""
        return self._on_host.writing()

    def remaining_s(self, transfer: int, layer: int | None = None) -> float:
        """Seconds until the transfer (or its layers up to ``layer``) has arrived, as far as the emulated
        link knows; 0 for one that is over, and on CUDA."""
        copy = self._copies.get(transfer)
        if copy is None:
            return 0.0
        return self._runner.remaining_s(copy, self.num_layers if layer is None else layer + 1)

    def bandwidth(self, direction: str) -> float:
        """Bytes per second of recent transfers in ``direction`` (``LOAD``, ``SAVE``); 0 before the first."""
        return self._meter.bandwidth(direction)

    def counters(self) -> dict[str, float]:
        """Totals since the start (see :class:`TransferMeter`), ``retries`` and ``in_flight``."""
        now = {"retries": self._runner.retries, "in_flight": len(self._copies)}
        return self._meter.counters() | now

    # -- inside -----------------------------------------------------------------------------------

    def _launch(self, direction: str, transfer: int, source: torch.Tensor, target: torch.Tensor) -> None:
        if self._copies:
            self._collect()
        if transfer in self._copies:
            raise TransferError(f"elora: transfer {transfer} is in flight already")
        source, target = _on_cpu(source), _on_cpu(target)
        read_tier, written_tier = self._sides(direction)
        fault = read_tier.fault(source, distinct=False) or written_tier.fault(target, distinct=True)
        if fault is None and len(source) != len(target):
            fault = f"{len(source)} slots cannot go to {len(target)}"
        after = self._predecessors(source, target, read_tier, written_tier) if fault is None else []
        if fault is None and after is None:
            fault = "its slots are in use by a copy in flight"
        if fault is not None or after is None:
            self._meter.failed(direction)
            raise TransferError(f"elora: {direction} {transfer} cannot start: {fault}")
        self._serial += 1
        if direction == LOAD:
            plan = RowCopy(self.host, self.device, source, target)
        else:
            plan = RowCopy(self.device, self.host, source, target)
        size = len(source) * sum(self.device.row_bytes)
        copy = Copy(transfer, self._serial, direction, source, target, plan, self.num_layers, size, after)
        try:
            self._runner.launch(copy)
        except Exception as error:
            self._meter.failed(direction)
            raise TransferError(f"elora: {copy.name} failed: {error}") from error
        self._forget_failure(transfer)
        self._copies[transfer] = copy
        read_tier.begin(source, copy.serial, write=False)
        written_tier.begin(target, copy.serial, write=True)

    def _sides(self, direction: str) -> tuple[SlotsInFlight, SlotsInFlight]:
        """(tier read, tier written)"""
        return (self._on_host, self._on_device) if direction == LOAD else (self._on_device, self._on_host)

    def _predecessors(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        read_tier: SlotsInFlight,
        written_tier: SlotsInFlight,
    ) -> list[Copy] | None:
        """Copies in flight that must come first; None when the order cannot be kept."""
        if not self._copies:
            return []
        if written_tier.writers(target):
            return None
        before = set(read_tier.writers(source))
        if written_tier.read(target):
            readers = self._meeting(target) if written_tier is self._on_device else []
            if not readers or not all(copy.released for copy in readers):
                return None
            before.update(copy.serial for copy in readers)
        return [copy for copy in self._copies.values() if copy.serial in before]

    def _meeting(self, slots: torch.Tensor) -> list[Copy]:
        """Copies in flight that touch one of these device slots, in launch order."""
        mask = torch.zeros(self.device.rows, dtype=torch.bool)
        mask[slots] = True
        return [
            copy
            for copy in self._copies.values()
            if bool(mask[copy.target_slots if copy.direction == LOAD else copy.source_slots].any())
        ]

    def _wait_released(self, written: torch.Tensor | None) -> None:
        mask = None
        if written is not None and written.device.type == "cpu":
            mask = torch.zeros(self.device.rows, dtype=torch.bool)
            mask[written.to(torch.int64)] = True
        started, waits, kept = self._clock(), 0, []
        for copy in self._released:
            if copy.over:
                continue
            if mask is not None and not bool(mask[copy.source_slots].any()):
                kept.append(copy)
                continue
            waits += self._runner.need(copy, self.num_layers)
        self._released = kept
        if waits:
            self._meter.waited("forward", waits, self._clock() - started)

    def _collect(self) -> None:
        """Retire what is over and note it for ``poll``."""
        over = []
        for copy in self._copies.values():
            if not copy.over:
                self._runner.advance(copy)
            if copy.over:
                over.append(copy)
        for copy in over:
            self._retire(copy)
            self._reports.append((copy.id, copy.done))
            if copy.failed is not None:
                self._meter.failed(copy.direction)
                self._remember_failure(copy.id, copy.failed)
            else:
                self._meter.completed(copy.direction, copy.layer_bytes * copy.layers, copy.seconds)

    def _retire(self, copy: Copy) -> None:
        read_tier, written_tier = self._sides(copy.direction)
        read_tier.end(copy.source_slots, write=False)
        written_tier.end(copy.target_slots, write=True)
        del self._copies[copy.id]
        if copy.released and copy in self._released:
            self._released.remove(copy)
        copy.after = []  # no chain of old copies stays alive

    def _remember_failure(self, transfer: int, why: str) -> None:
        self._failed[transfer] = why
        self._failed_order.append(transfer)
        if len(self._failed_order) > REMEMBERED:
            self._failed.pop(self._failed_order.popleft(), None)

    def _forget_failure(self, transfer: int) -> None:
        """An id that is used again starts anew."""
        self._failed.pop(transfer, None)


def _on_cpu(slots: torch.Tensor) -> torch.Tensor:
    return slots if slots.device.type == "cpu" else slots.cpu()
