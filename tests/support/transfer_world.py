"""A device pool full of random bytes, a host pool, and a clock that only sleeping moves."""

from __future__ import annotations

import torch

from elora_sglang.runtime.pool.host import HostPool
from elora_sglang.runtime.pool.views import UnifiedPool
from elora_sglang.runtime.transfers.engine import TransferEngine
from elora_sglang.runtime.transfers.link import Link
from elora_sglang.runtime.transfers.row_copy import RowCopy

LAYERS = 3


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.slept = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds


def make_device(dtype: torch.dtype = torch.bfloat16, page: int = 1, slots: int = 256) -> UnifiedPool:
    """K rows wider than V rows, so that a mix-up of the two shows."""
    generator = torch.Generator().manual_seed(5)
    buffers = []
    for heads in (2, 1):
        tensors = [torch.zeros((slots + page, heads, 16), dtype=dtype) for _ in range(LAYERS)]
        for tensor in tensors:
            tensor.view(torch.uint8).random_(generator=generator)
        buffers.append(tensors)
    return UnifiedPool(*buffers, page_size=page)


TEN, NEXT = torch.arange(20, 30), torch.arange(40, 50)


def whole_pages(firsts: list[int], page: int) -> torch.Tensor:
    """Slots of whole pages, in the order of the pages."""
    return (torch.tensor(firsts)[:, None] * page + torch.arange(page)).flatten()


class World:
    """Two tiers, and an engine whose link carries one layer of ten slots in a second."""

    def __init__(
        self, *, link: bool = True, page: int = 1, dtype: torch.dtype = torch.bfloat16, **engine
    ) -> None:  # type: ignore[no-untyped-def]
        self.clock = Clock()
        self.device = make_device(dtype, page)
        self.host = HostPool(128, self.device, pin=False)
        self.link = Link(10 * sum(self.device.row_bytes) / 1e9 if link else 0)
        self.engine = TransferEngine(
            self.device, self.host, self.link, clock=self.clock, sleep=self.clock.sleep, **engine
        )

    def rows(self, pool: UnifiedPool, slots: torch.Tensor, layer: int) -> torch.Tensor:
        """The slots' bytes in one layer, K and V: a copy."""
        return torch.cat([pool.byte_rows(layer, stream)[slots] for stream in (0, 1)], dim=1)

    def all_rows(self, pool: UnifiedPool, slots: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.rows(pool, slots, layer) for layer in range(LAYERS)])

    def overwrite(self, pool: UnifiedPool, slots: torch.Tensor, value: int) -> None:
        for layer in range(LAYERS):
            for stream in (0, 1):
                pool.byte_rows(layer, stream)[slots] = value

    def saved(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Host slots that hold these device slots, and the bytes; the device slots hold zeros then."""
        host = self.host.alloc(len(slots))
        assert host is not None
        self.engine.save(999, slots, host)
        self.engine.drain()
        assert self.engine.poll() == [(999, True)]
        kept = self.all_rows(self.device, slots)
        self.overwrite(self.device, slots, 0)
        return host, kept


class Faulty:
    """Copies one layer like the engine's own copying, except where it is told to fail."""

    def __init__(self, layer: int, times: int, kind: str = "raise") -> None:
        self.layer, self.times, self.kind = layer, times, kind
        self.armed = True

    def __call__(self, plan: RowCopy, layer: int) -> int:
        if self.armed and layer == self.layer and self.times:
            self.times -= 1
            if self.kind == "raise":
                raise RuntimeError("planted fault")
            rows = plan.copy_layer(layer)
            if self.kind == "short":
                return rows - 1
            plan.pools[1].byte_rows(layer, 1)[plan.units.target[:1] * plan.units.page] ^= 1
            return rows
        return plan.copy_layer(layer)
