"""The server's backend of ``core/executor.py``: slots of both tiers, copies between them, files.

The manager says *what*; this class knows *where*: it takes slots from SGLang's allocator and from the host pool,
starts copies, reads adapters' files, and tells the manager what became of it. It decides nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from elora_sglang.core.actions import Load, Read, Save
from elora_sglang.core.manager import CacheManager
from elora_sglang.core.tree.node import HostVictim, Node, Victim
from elora_sglang.runtime.adapters.files import AdapterError
from elora_sglang.runtime.audit.device import Auditor
from elora_sglang.runtime.cost_meter import CostMeter
from elora_sglang.runtime.host_tier import HostTier
from elora_sglang.runtime.lora_pool import LoRAPool
from elora_sglang.runtime.transfers.engine import TransferError

logger = logging.getLogger(__name__)


@dataclass
class CacheStats:
    """What was carried out since start: ``done`` in ``/server_info``. Counted when it happens, sizes in slots.

    Attributes:
        adapter_loads, adapter_slots_loaded: adapters that came to the device, from wherever, and their slots.
        adapter_evictions: adapters that left the device.
        kv_evictions, kv_tokens_evicted: KV nodes that left the device, and their tokens.
        demoted, adapters_demoted: nodes that left the device and stayed on the host; adapters among them.
        dropped: nodes that left the device with no other copy in memory.
        host_evicted: nodes that left the host.
        load_backs, adapter_load_backs, slots_loaded_back: nodes that came back from the host, and their slots.
        loads_at_admission, queue_prefetches: of those, for a request being admitted; for a waiting one.
        idle_prefetches_kv, idle_prefetches_adapter: of those, ahead of any request.
        backed_up: nodes whose copy to the host was started ahead of need.
        saved_under_pressure: nodes whose copy to the host was started while they were evicted.
        adapter_reads: reads of adapters' files into the host pool that were started.
        failed_transfers: copies and reads that could not be started, or failed.
        tokens_device, tokens_host, tokens_computed: prompt tokens of admitted requests, by where their KV came from.
    """

    adapter_loads: int = 0
    adapter_slots_loaded: int = 0
    adapter_evictions: int = 0
    kv_evictions: int = 0
    kv_tokens_evicted: int = 0
    demoted: int = 0
    adapters_demoted: int = 0
    dropped: int = 0
    host_evicted: int = 0
    load_backs: int = 0
    adapter_load_backs: int = 0
    slots_loaded_back: int = 0
    loads_at_admission: int = 0
    queue_prefetches: int = 0
    idle_prefetches_kv: int = 0
    idle_prefetches_adapter: int = 0
    backed_up: int = 0
    saved_under_pressure: int = 0
    adapter_reads: int = 0
    failed_transfers: int = 0
    tokens_device: int = 0
    tokens_host: int = 0
    tokens_computed: int = 0


@dataclass
class _Reading:
    transfer: int
    size: int
    began: float


@dataclass
class _Saving:
    """A save whose host slots are known: slot i of ``device`` goes to slot i of ``host``."""

    transfer: int
    device: torch.Tensor
    host: torch.Tensor


@dataclass
class SwapDriver:
    """What the actions of one :class:`CacheManager` do to SGLang's allocator, the host pool and the LoRA pool.

    Args:
        manager: decides.
        allocator: SGLang's allocator of device slots.
        weights: the LoRA pool, which places adapters.
        tier: host pool and transfer engine; ``None`` without a host tier.
        stats: counters to keep.
        order: orders what comes next on the current stream behind the last launched forward.
        meter: told how long files took.
        auditor: told of every copy.
        loading: transfers to the device that are in flight, with what they bring; kept up to date here.
    """

    manager: CacheManager
    allocator: Any
    weights: LoRAPool
    tier: HostTier | None
    stats: CacheStats
    order: Callable[[], None] = lambda: None
    meter: CostMeter | None = None
    auditor: Auditor | None = None
    loading: dict[int, Load] = field(default_factory=dict)
    #: Device slots that running requests were promised: copies of the swapper leave them.
    reserve: int = 0
    #: Saves in flight, with the copy that carries them: the saves of one plan travel together.
    _saving: dict[int, int] = field(default_factory=dict)
    _reading: dict[str, _Reading] = field(default_factory=dict)
    _read_outcomes: dict[int, bool] = field(default_factory=dict)

    # -- slots ------------------------------------------------------------------------------------

    def available(self) -> int:
        """Device slots that nobody has."""
        return int(self.allocator.available_size())

    def spares(self, need: int) -> bool:
        """Whether ``need`` device slots can go without touching the reserve. What a copy holds cannot be evicted."""
        room = self.allocator.available_size() + self.manager.tree.evictable_size
        return not self.reserve or bool(room >= need + self.reserve)

    def free(self, victims: Sequence[Victim]) -> list[int]:
        """Give the victims' device slots back; saved ones are copied out first. Returns copies that did not start."""
        freed: list[torch.Tensor] = []
        failed: list[int] = []
        for victim in victims:
            if victim.payload is None:
                continue  # a load that found no room: it never had slots
            if victim.kind == "adapter":
                self.weights.drop(victim.key)
                self.stats.adapter_evictions += 1
            else:
                self.stats.kv_evictions += 1
                self.stats.kv_tokens_evicted += victim.size
            if victim.fate == "dropped":
                self.stats.dropped += 1
            else:
                self.stats.demoted += 1
                self.stats.adapters_demoted += victim.kind == "adapter"
            if victim.fate == "saved":
                failed += self._save_under_pressure(victim)
            freed.append(victim.payload)
        if not freed:
            return failed
        # Payloads are whole pages in row order, whatever their owners were. Together, because SGLang's allocator
        # copies its whole free list each time.
        self.allocator.free_segment(torch.cat(freed), start_pos=0)
        return failed

    def free_host(self, victims: Sequence[HostVictim]) -> None:
        """Give the victims' host slots back."""
        for victim in victims:
            self.stats.host_evicted += 1
            if victim.kind == "adapter":
                self.weights.store.drop_host(victim.key)
            if victim.payload is not None and self.tier is not None:
                self.tier.host.free(victim.payload)

    # -- copies and files -------------------------------------------------------------------------

    def load(self, action: Load) -> bool:
        """Give the nodes device slots and start their copy; False when that was not possible."""
        assert self.tier is not None
        slots = self.allocator.alloc(action.size)
        if slots is None:
            self.stats.failed_transfers += 1
            return False
        slots = slots.to(torch.int64, copy=True)  # alloc returns a view of the whole free list
        parts = list(slots.split([item.size for item in action.items]))
        # Bytes of an adapter lie in ascending slots, whatever order they were given in.
        parts = [
            p.sort().values if i.kind == "adapter" else p for i, p in zip(action.items, parts, strict=True)
        ]
        self.manager.loaded(action.transfer, parts)
        host, device = torch.cat([item.host_payload for item in action.items]), torch.cat(parts)
        # The engine queues it behind the running forward, on a stream of its own: this one waits for nothing, so that
        # the next look at a slot list does not wait for the forward.
        try:
            self.tier.engine.load(action.transfer, host, device)
        except TransferError as error:
            logger.warning("elora: a copy from the host failed, its content is recomputed: %s", error)
            self.stats.failed_transfers += 1
            return False
        for item, part in zip(action.items, parts, strict=True):
            if item.kind == "adapter":
                self.weights.adopt(item.key, part)
        self.loading[action.transfer] = action
        if self.auditor is not None:
            self.auditor.loaded(host, device)
        self._count_load(action)
        return True

    def _count_load(self, action: Load) -> None:
        adapters = sum(item.kind == "adapter" for item in action.items)
        kv = len(action.items) - adapters
        stats = self.stats
        stats.load_backs += len(action.items)
        stats.adapter_load_backs += adapters
        stats.slots_loaded_back += action.size
        stats.adapter_loads += adapters
        stats.adapter_slots_loaded += sum(item.size for item in action.items if item.kind == "adapter")
        if action.why == "idle":
            stats.idle_prefetches_kv += kv
            stats.idle_prefetches_adapter += adapters
        elif action.why == "queue":
            stats.queue_prefetches += len(action.items)
        else:
            stats.loads_at_admission += len(action.items)

    def _host_slots(self, sizes: list[int]) -> list[torch.Tensor] | None:
        assert self.tier is not None
        slots = self.tier.host.alloc(sum(sizes))
        return None if slots is None else list(slots.split(sizes))

    def place(self, action: Save) -> _Saving | None:
        """Give the nodes host slots; their copy is still to start. ``None`` when that was not possible."""
        assert self.tier is not None
        if not self.spares(0):
            return None
        parts = self._host_slots([item.size for item in action.items])
        if parts is None:
            self.stats.failed_transfers += 1
            return None
        self.manager.saved(action.transfer, parts)
        self.stats.backed_up += len(action.items)
        return _Saving(action.transfer, torch.cat([i.payload for i in action.items]), torch.cat(parts))

    def start(self, placed: Sequence[_Saving]) -> list[int]:
        """One copy for all of them: starting one costs the scheduler more than most saves' bytes do."""
        device, host = torch.cat([s.device for s in placed]), torch.cat([s.host for s in placed])
        return self._start_save([s.transfer for s in placed], device, host)

    def _save_under_pressure(self, victim: Victim) -> list[int]:
        assert self.tier is not None and victim.transfer is not None
        parts = self._host_slots([victim.size])
        if parts is None:
            self.stats.failed_transfers += 1
            return [victim.transfer]
        self.manager.saved(victim.transfer, parts)
        failed = self._start_save([victim.transfer], victim.payload, parts[0])
        if not failed:
            self.tier.engine.release_after(victim.transfer)
            self.stats.saved_under_pressure += 1
        return failed

    def _start_save(self, transfers: list[int], device: torch.Tensor, host: torch.Tensor) -> list[int]:
        """Copy their slots as one; the engine knows it by the first one's id. Returns them where it did not start."""
        assert self.tier is not None
        try:
            self.tier.engine.save(transfers[0], device, host)
        except TransferError as error:
            logger.warning("elora: a copy to the host failed: %s", error)
            self.stats.failed_transfers += len(transfers)
            return transfers
        self._saving.update((transfer, transfers[0]) for transfer in transfers)
        if self.auditor is not None:
            self.auditor.saved(device, host)
        return []

    def read(self, action: Read) -> bool:
        """Begin to read an adapter's file into host slots, in a thread of its own."""
        parts = self._host_slots([action.size])
        if parts is None:
            self.stats.failed_transfers += 1
            return False
        self.manager.saved(action.transfer, parts)
        try:
            self.weights.store.start_read(action.key, parts[0])
        except (KeyError, ValueError) as error:  # unloaded meanwhile, or its old version is still being read
            logger.warning("elora: an adapter cannot be read into host memory now: %s", error)
            self.stats.failed_transfers += 1
            return False
        self._reading[action.key] = _Reading(action.transfer, action.size, time.perf_counter())
        self.stats.adapter_reads += 1
        return True

    def read_to_device(self, node: Node) -> torch.Tensor | None:
        """Read an adapter's file into device slots, which blocks; ``None`` when there is no room.

        Raises:
            AdapterError: its file is gone, broken or has other content; nothing is changed.
        """
        slots = self.allocator.alloc(node.size)
        if slots is None:
            return None
        # alloc returns a view of the whole free list; an adapter lies in ascending slots, as its host copy does.
        slots = slots.to(torch.int64, copy=True).sort().values
        self.order()
        if self.tier is not None:
            self.tier.engine.wait_for_slots(slots)  # a save may still read what was evicted a moment ago
        try:
            self.weights.load(node.key, slots)
        except AdapterError:
            self.allocator.free_segment(slots, start_pos=0)
            raise
        self.stats.adapter_loads += 1
        self.stats.adapter_slots_loaded += node.size
        return slots

    # -- what became of it ------------------------------------------------------------------------

    def finished(self) -> list[tuple[int, bool]]:
        """Transfers that ended on this rank since the last call, with their outcome."""
        if self.tier is None:
            return []
        copies: list[tuple[int, bool]] = []
        for copy, ok in self.tier.engine.poll():
            carried = [transfer for transfer, by in self._saving.items() if by == copy]
            copies += [(transfer, ok) for transfer in carried or (copy,)]
        return [*copies, *self._reads_ended(wait=False)]

    def _reads_ended(self, *, wait: bool) -> list[tuple[int, bool]]:
        assert self.tier is not None
        ended = []
        for key, error in self.weights.store.poll_reads(wait=wait):
            reading = self._reading.pop(key, None)
            if reading is None:
                continue
            ended.append((reading.transfer, error is None))
            if error is not None:
                logger.warning("elora: %s", error)
            elif self.meter is not None:
                self.meter.read(time.perf_counter() - reading.began, reading.size * self.tier.host.slot_bytes)
        return ended

    def book_ended(self, finished: Iterable[tuple[int, bool]], *, follower: bool) -> None:
        """Forget transfers that rank 0 saw end; another rank first waits for its own copy of them.

        Raises:
            RuntimeError: a copy failed here that succeeded on rank 0: the ranks would decide differently.
        """
        for transfer, ok in finished:
            if follower:
                mine = self._wait(transfer)
                if ok and not mine:
                    raise RuntimeError(f"elora: transfer {transfer} failed on this rank and not on rank 0")
            self.loading.pop(transfer, None)
            self._saving.pop(transfer, None)
            self.stats.failed_transfers += not ok

    def _wait(self, transfer: int) -> bool:
        assert self.tier is not None
        if any(reading.transfer == transfer for reading in self._reading.values()):
            self._read_outcomes.update(self._reads_ended(wait=True))
        if transfer in self._read_outcomes:
            return self._read_outcomes.pop(transfer)
        return self.tier.engine.wait(self._saving.get(transfer, transfer))

    @property
    def busy(self) -> bool:
        """Whether a copy or a read is in flight."""
        return bool(self.loading or self._saving or self._reading)

    def drain(self) -> None:
        """Wait for everything in flight and forget it, as before a flush. The host pool is empty afterwards."""
        if self.tier is None:
            return
        self.tier.engine.drain()
        self.tier.engine.poll()
        self.weights.store.drop_all()
        self.weights.store.poll_reads(wait=True)
        self._reading.clear()
        self._read_outcomes.clear()
        self.loading.clear()
        self._saving.clear()
        self.tier.host.clear()
