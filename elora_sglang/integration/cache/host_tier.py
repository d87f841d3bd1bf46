"""Builds the host tier of one scheduler process: how large it is, and what its links cost."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.runtime_context import get_parallel

from elora_sglang.core.costs import Costs
from elora_sglang.runtime.host_tier import HostTier
from elora_sglang.runtime.pool import host_size
from elora_sglang.runtime.pool.host import HostPool
from elora_sglang.runtime.transfers.engine import TransferEngine
from elora_sglang.runtime.transfers.link import Link

if TYPE_CHECKING:
    from elora_sglang.integration.plugin.config import EloraConfig
    from elora_sglang.runtime.pool.views import UnifiedPool

logger = logging.getLogger(__name__)

#: Slots of the copies that measure the link at start-up.
PROBE_SLOTS = 256


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
