"""Timing on a GPU: graph replays between events, and the ceilings that times are judged by."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Replays that are not counted, and that are.
WARM, MEASURED = 3, 15


@dataclass(frozen=True)
class Bench:
    """How to time. ``dry``: on a CPU, once, for nothing but to see that it runs."""

    device: torch.device
    dry: bool

    def seconds(self, work: Callable[[], object], *, graph: bool = True) -> float:
        """Median seconds of ``work``, which should take hundreds of microseconds: its launches go into one graph.

        ``graph``: False for work that cannot be captured.
        """
        if self.dry:
            begun = time.perf_counter()
            work()
            return time.perf_counter() - begun
        work()
        torch.cuda.synchronize()
        run = work
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                work()
            run = captured.replay
        times = []
        for number in range(WARM + MEASURED):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if number >= WARM:
                times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def ceilings(self) -> dict[str, float]:
        """Bytes per second of a large copy on the device (read plus written) and of pinned copies; FLOP/s of bf16."""
        size = 2**20 if self.dry else 2**31
        one = torch.empty(size, dtype=torch.uint8, device=self.device).random_()
        other = torch.empty_like(one)
        host = torch.empty(min(size, 2**29), dtype=torch.uint8).random_()
        if not self.dry:
            host = host.pin_memory()
        part = one[: len(host)]
        side = 64 if self.dry else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        return {
            "copy_bytes_s": 2 * size / self.seconds(lambda: other.copy_(one)),
            "to_device_bytes_s": len(host)
            / self.seconds(lambda: part.copy_(host, non_blocking=True), graph=False),
            "to_host_bytes_s": len(host)
            / self.seconds(lambda: host.copy_(part, non_blocking=True), graph=False),
            "matmul_flop_s": 2 * side**3 / self.seconds(lambda: torch.mm(a, b)),
        }


def bench(dry: bool) -> Bench:
    """On the current CUDA device, or dry. Raises SystemExit where there is none."""
    if not dry and not torch.cuda.is_available():
        raise SystemExit(
            "eval.gpu: no CUDA device; --dry-run with TRITON_INTERPRET=1 shows on a CPU that it runs"
        )
    return Bench(torch.device("cpu" if dry else "cuda"), dry)


def hardware(device: torch.device) -> dict[str, object]:
    """The card and the versions that matter for a kernel."""
    import triton

    found: dict[str, object] = {"torch": torch.__version__, "triton": triton.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30)}
    return found
