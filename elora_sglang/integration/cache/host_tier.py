"""The host tier of one scheduler process: how large it is, what its links cost, and its manager."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.runtime_context import get_parallel

from elora_sglang.core.costs import Costs
from elora_sglang.core.manager import CacheManager, SwapSettings
from elora_sglang.core.swapper import switches
from elora_sglang.core.trace import Recorder
from elora_sglang.runtime.pool import host_size
from elora_sglang.runtime.pool.host import HostPool
from elora_sglang.runtime.transfers.engine import TransferEngine
from elora_sglang.runtime.transfers.link import LOAD, SAVE, Link

if TYPE_CHECKING:
    from elora_sglang.integration.plugin.config import EloraConfig
    from elora_sglang.runtime.pool.slots import SlotPayloads
    from elora_sglang.runtime.pool.views import UnifiedPool

logger = logging.getLogger(__name__)

#: Slots of the copies that measure the link at start-up.
PROBE_SLOTS = 256


@dataclass
class HostTier:
    """Host pool and transfers of one rank.

    Attributes:
        host: the host slots.
        engine: copies between them and the device pool.
        link: the emulated link; ``None`` when copies take what they take.
        costs: what things cost, as measured at start-up; rank 0's on every rank.
    """

    host: HostPool
    engine: TransferEngine
    link: Link | None
    costs: Costs

    def wait_until(self, layer: int) -> None:
        """SGLang's KV pool and the LoRA backend call this before they read ``layer``."""
        self.engine.wait_layer(layer)

    def bandwidths(self) -> tuple[float | None, float | None]:
        """Bytes per second to the device and from it, as measured; ``None`` where nothing was copied yet."""
        return self.engine.bandwidth(LOAD) or None, self.engine.bandwidth(SAVE) or None

    def state(self) -> dict[str, Any]:
        """Bytes moved and bandwidths, for ``/server_info``."""
        return {**self.engine.counters(), "link_gbps": self.engine.link.gbps}


def ranks() -> tuple[int, int]:
    """This process's tensor-parallel rank and their number; one rank outside a server."""
    try:
        parallel = get_parallel()
        return int(parallel.tp_rank), int(parallel.tp_size)
    except Exception:  # not initialised: a unit test
        return 0, 1


def build(
    settings: EloraConfig, pool: UnifiedPool, device_slots: int, forward_stream: Any
) -> HostTier | None:
    """Allocate the host pool and measure its links; ``None`` when ``--elora-host-memory`` is 0.

    A collective when there are several ranks: all get the smallest pool and rank 0's costs.

    Raises:
        SystemExit: the memory cannot be had.
    """
    size = ranks()[1]
    try:
        slots = host_size.host_slots(
            settings.host_memory,
            device_slots=device_slots,
            slot_bytes=pool.num_layers * sum(pool.row_bytes),
            page_size=pool.page_size,
            ranks=size,
            available_bytes=host_size.available_bytes(),
        )
        slots = _smallest(slots) if size > 1 else slots
        if slots < pool.page_size:
            return None
        host = HostPool(slots, pool, pin=pool.device.type == "cuda")
    except (MemoryError, ValueError) as error:
        raise SystemExit(f"elora: {error}") from None
    link = Link(settings.link_gbps) if settings.link_gbps else None
    engine = TransferEngine(pool, host, link, forward_stream)
    costs = _measure(pool, host, link)
    costs = _of_rank_0(costs) if size > 1 else costs
    logger.info("elora: host tier of %d slots (%.2f GB); %s", slots, host.nbytes / 1e9, costs)
    return HostTier(host, engine, link, costs)


def _measure(pool: UnifiedPool, host: HostPool, link: Link | None) -> Costs:
    """Costs with the links' bandwidths: the emulated ones, or those of a few copies of free slots."""
    default = Costs.default()
    slot_bytes = host.slot_bytes
    if link is not None:
        rates = (link.bytes_s, link.bytes_s)
    else:
        count = min(PROBE_SLOTS, host.num_slots, pool.rows - pool.page_size)
        device = slice(pool.page_size, pool.page_size + count)
        rates = tuple(_rate(pool, host, device, count, to_device) for to_device in (True, False))  # type: ignore[assignment]
    return Costs(
        slot_bytes=slot_bytes,
        load_bytes_s=rates[0],
        save_bytes_s=rates[1],
        disk_bytes_s=default.disk_bytes_s,
        latency_s=default.latency_s,
        prefill_token_s=default.prefill_token_s,
        prefill_token2_s=default.prefill_token2_s,
    )


def _rate(pool: UnifiedPool, host: HostPool, device: slice, count: int, to_device: bool) -> float:
    """Bytes per second of copying ``count`` slots of all layers, best of three. No slot is in use yet."""

    def copy() -> None:
        for layer in range(pool.num_layers):
            for stream in (0, 1):
                mine, theirs = pool.byte_rows(layer, stream)[device], host.byte_rows(layer, stream)[:count]
                (mine if to_device else theirs).copy_(theirs if to_device else mine, non_blocking=True)

    def wait() -> None:
        if pool.device.type == "cuda":
            torch.cuda.synchronize()

    best = float("inf")
    for _ in range(3):
        wait()
        start = time.perf_counter()
        copy()
        wait()
        best = min(best, time.perf_counter() - start)
    return count * host.slot_bytes / max(best, 1e-9)


def _smallest(slots: int) -> int:
    found = torch.tensor([slots])
    group = get_parallel().tp_group.cpu_group
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MIN, group=group)
    return int(found.item())


def _of_rank_0(costs: Costs) -> Costs:
    group = get_parallel().tp_group
    box = [costs]
    torch.distributed.broadcast_object_list(box, src=group.ranks[0], group=group.cpu_group)
    return box[0]


def build_manager(
    settings: EloraConfig, tier: HostTier | None, payloads: SlotPayloads, *, page_size: int, slots: int
) -> CacheManager:
    """The manager of one scheduler process; without a tier it has no host slots and plans no copies."""
    return CacheManager(
        page_size=page_size,
        device_slots=slots,
        policy_name=settings.policy,
        payloads=payloads,
        settings=SwapSettings(
            host_slots=0 if tier is None else tier.host.num_slots,
            busy_watermark=settings.busy_watermark,
            idle_watermark=settings.idle_watermark,
            swap_interval_s=settings.swap_interval,
            lora_share=settings.lora_share,
            **switches(settings.without_terms),
        ),
        costs=Costs.default() if tier is None else tier.costs,
    )


class TraceFile:
    """Where events and actions are recorded; written in large pieces, and to the disk every second."""

    def __init__(self, path: str) -> None:
        self._file = open(path, "w", buffering=1 << 20, encoding="utf-8")  # noqa: SIM115  # open until the end
        self._flushed = 0.0

    def write(self, line: str) -> None:
        """Add one line."""
        self._file.write(line)
        self._file.write("\n")

    def tick(self, now: float) -> None:
        """Time (seconds) went on: a server that is killed loses little of its trace."""
        if now - self._flushed >= 1.0:
            self._flushed = now
            self._file.flush()


def record(manager: CacheManager, path: str, rank: int) -> TraceFile | None:
    """Record the manager's events and actions into ``path`` (ranks after the first: ``path.rankN``), if given."""
    if not path:
        return None
    file = TraceFile(path if rank == 0 else f"{path}.rank{rank}")
    Recorder(manager, file.write)
    return file
