"""What the GPU scripts share: times of graph replays, the ceilings that they are judged by, and the form of results."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elora_sglang.eval.support import reporting

#: Replays that are not counted, and that are.
WARM, MEASURED = 3, 15
DRY = "a dry run: these times mean nothing"


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
        host = torch.empty(min(size, 2**29), dtype=torch.uint8, pin_memory=not self.dry).random_()
        part, side = one[: len(host)], 64 if self.dry else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=torch.bfloat16) for _ in range(2))

        def link(target: torch.Tensor, source: torch.Tensor) -> float:
            seconds = self.seconds(lambda: target.copy_(source, non_blocking=True), graph=False)
            return len(host) / seconds

        return {
            "copy_bytes_s": 2 * size / self.seconds(lambda: other.copy_(one)),
            "to_device_bytes_s": link(part, host),
            "to_host_bytes_s": link(host, part),
            "matmul_flop_s": 2 * side**3 / self.seconds(lambda: torch.mm(a, b)),
        }


def bench(dry: bool) -> Bench:
    """On the current CUDA device, or dry. Raises SystemExit where there is none."""
    if not dry and not torch.cuda.is_available():
        raise SystemExit(
            "eval.gpu: no CUDA device; --dry-run with TRITON_INTERPRET=1 shows on a CPU that it runs"
        )
    return Bench(torch.device("cpu" if dry else "cuda"), dry)


def dry_run_parser(module: str, about: str | None) -> argparse.ArgumentParser:
    """Arguments of a script that times on a GPU: ``--dry-run`` and ``--json``."""
    parser = argparse.ArgumentParser(prog=f"python -m elora_sglang.eval.gpu.{module}", description=about)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny: shows that it runs")
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    return parser


def _hardware(device: torch.device) -> dict[str, object]:
    """The card and the versions that matter for a kernel."""
    import triton

    found: dict[str, object] = {"torch": torch.__version__, "triton": triton.__version__}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30)}
    return found


def finish(
    path: Path,
    title: str,
    tables: Sequence[reporting.Table],
    aims: Sequence[reporting.Aim],
    data: Mapping[str, Any],
    device: torch.device,
) -> None:
    """Print the tables and aims, and write the JSON that ``report`` reads. A dry run has no aims."""
    dry = bool(data.get("dry_run"))
    judged, title = ([], f"{title} ({DRY})") if dry else (aims, title)
    result = reporting.as_json(tables, judged, {"title": title, **data}, _hardware(device))
    path.write_text(json.dumps(result, indent=1) + "\n")
    reporting.show(tables, judged)
    print(DRY if dry else f"written to {path.name}")
