"""``python -m elora_sglang.eval.gpu.kernel_bench``: every op checked, then timed against what the GPU can do at all.

Needs PyTorch, Triton and this package, nothing else. Checks: all awkward cases of all ops on fresh random inputs
against float64, outputs poisoned. Times: LoRA of the four linear modules of a Llama-3-8B layer, layer after layer so
that no weights are cached, over adapters x LoRA ranks x batch, uniform and skewed popularity, beside SGLang's csgmv
kernels and FlashInfer's SegmentGEMM on slot buffers of the largest rank where they can be imported; and row copies
between scattered device slots and pinned host memory beside a plain pinned copy. Where FlashInfer can be imported, its
paged attention runs on a pool that holds adapters, too.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from elora_sglang.eval.gpu import attention, peers
from elora_sglang.eval.gpu.cases import OPS, awkward
from elora_sglang.eval.gpu.cases import page_copy as copy_inputs
from elora_sglang.eval.gpu.llama import LLAMA_8B, TINY, Adapters, Module, Shape
from elora_sglang.eval.gpu.timing import Bench, bench, dry_run_parser, finish
from elora_sglang.eval.support import reporting
from elora_sglang.kernels.page_copy import triton_kernel as page_copy
from elora_sglang.kernels.paged_lora import plan_segments, reference
from elora_sglang.kernels.paged_lora import triton_kernel as paged_lora
from elora_sglang.kernels.paged_lora.tables import DeviceBatch

AIM_BANDWIDTH, AIM_EQUAL, AIM_MIXED, AIM_COPY = 0.85, 1.05, 0.8, 0.9
#: Directions of a row copy, and the plain copies that they are judged by.
WAYS = {"to the device": "to_device_bytes_s", "to the host": "to_host_bytes_s"}
LORA = (
    "adapters", "rows", "skew", "distinct", "us a layer", "of copy bandwidth", "over csgmv",
    "over SegmentGEMM (no graph)",
)  # fmt: skip


@dataclass(frozen=True)
class Load:
    """A decode batch: LoRA ranks of the adapters, rows, and the skew of their popularity (Zipf exponent)."""

    name: str
    ranks: tuple[int, ...]
    rows: int
    skew: float

    def picks(self, seed: int) -> list[int]:
        """The adapter of each row."""
        rng = random.Random(f"{seed}/{self.name}")
        weights = [(1 + number) ** -self.skew for number in range(len(self.ranks))]
        return rng.choices(range(len(self.ranks)), weights, k=self.rows)


def loads(dry: bool) -> Iterator[Load]:
    """Equal ranks and mixed ones, few adapters and many, batches of a busy server."""
    mixed = (8, 16, 32, 64)
    counts, batches = ((2,), (4,)) if dry else ((128, 32, 8, 1), (256, 32))
    for count in counts:
        for rows in batches:
            for skew in (0.0, 1.2) if count > 1 else (0.0,):
                for rank in (4,) if dry else (16, 64):
                    yield Load(f"{count} of rank {rank}", (rank,) * count, rows, skew)
                if count > 1:
                    ranks = tuple(mixed[number % len(mixed)] for number in range(count))
                    yield Load(f"{count} of ranks 8 to 64", ranks, rows, skew)


def check(device: torch.device, seed: int) -> list[dict[str, Any]]:
    """Every awkward case of every op: what failed, or an empty text."""
    found = []
    for op in OPS:
        for case in awkward(op, seed, device):
            fault = ""
            try:
                case.check("triton")
            except AssertionError as error:
                fault = str(error).strip().splitlines()[0]
            found.append({"op": op, "case": case.name, "fault": fault})
    return found


def lora(how: Bench, shape: Shape, load: Load, configs: Sequence[paged_lora.Config]) -> dict[str, Any]:
    """Seconds a layer of all four modules, the bytes they must move, and the same by slot buffers."""
    layers, modules, rows, picks = 1 if how.dry else 8, shape.modules, load.rows, load.picks(1)
    adapters = Adapters(shape, list(load.ranks), layers, how.device)
    packed, scalings = [None, *adapters.packed], [0.5] * (1 + len(load.ranks))
    segments = plan_segments([1] * rows, [1 + pick for pick in picks], packed, scalings, how.device)
    batch = DeviceBatch.of(adapters.tables, segments, tile_rows=16)
    options: dict[str, Any] = {"device": how.device, "dtype": torch.bfloat16}
    xs = {m.name: torch.randn(rows, m.in_features, **options) for m in modules}
    outs = {m.name: torch.zeros(rows, sum(m.widths), **options) for m in modules}
    used = sorted(set(picks))
    moved = sum(adapters.module_bytes(number, m) for m in modules for number in used)
    moved += sum(2 * rows * (m.in_features + 2 * sum(m.widths)) for m in modules)

    def error(m: Module) -> float:
        out = outs[m.name].clone()
        paged_lora.add_lora(xs[m.name], out, batch, adapters.place(0, m), configs[0])
        right = reference.add_lora(xs[m.name], outs[m.name].clone(), segments, 0, m.name)
        return float((out.double() - right.double()).norm() / right.double().norm())

    def work(config: paged_lora.Config) -> None:
        for layer in range(layers):
            for m in modules:
                paged_lora.add_lora(xs[m.name], outs[m.name], batch, adapters.place(layer, m), config)

    worst = max(map(error, modules))
    times = {
        f"splits {one.splits}, blocks {one.in_block} and {one.out_block}": how.seconds(partial(work, one))
        / layers
        for one in configs
    }
    decode = peers.Decode(how, shape, load.ranks, picks, xs, outs, layers)
    return {
        "load": load.name, "rows": rows, "skew": load.skew, "distinct": len(used), "bytes": moved,
        "seconds": min(times.values()), "configs": times, "error_against_reference": worst,
        "slot_buffer_seconds": peers.CSGMV.seconds(decode), "segment_gemm_seconds": peers.SEGMENT_GEMM.seconds(decode),
    }  # fmt: skip


def copies(how: Bench, shape: Shape) -> list[dict[str, Any]]:
    """Row copies between scattered device slots and pinned host slots: bytes and seconds."""
    layers, size = (1, 64) if how.dry else (shape.layers, 8192)
    words = shape.kv_row[0] * shape.kv_row[1] * 2 // 8
    generator = torch.Generator().manual_seed(0)
    host, device = (
        copy_inputs.make_rows(
            size, (words, words), layers, generator=generator, store=where, device=how.device
        )
        for where in ("cpu", how.device)
    )
    ways = {"to the device": (host, device), "to the host": (device, host)}
    found = []
    for slots in (16,) if how.dry else (16, 256, 2048):
        there, here = (
            torch.randperm(size, generator=generator)[:slots].to(torch.int32).to(how.device) for _ in range(2)
        )
        one = {"slots": slots, "bytes": slots * 2 * words * 8 * layers}
        for (way, pools), per in itertools.product(ways.items(), (1, 4, 16)):
            config = page_copy.Config(slots=per)
            work = partial(page_copy.copy_rows, *pools, there, here, range(layers), config)
            found.append({"way": way, "per_program": per, **one, "seconds": how.seconds(work)})
    return found


def _over(seconds: float, other: float | None) -> str:
    return "not compared" if not other else f"{seconds / other:.2f}x"


def tables(result: dict[str, Any]) -> list[reporting.Table]:
    """LoRA and copies."""
    ceilings = result["ceilings"]
    lora = [
        [
            one["load"], one["rows"], f"{one['skew']:g}", one["distinct"], f"{1e6 * one['seconds']:.1f}",
            f"{one['bytes'] / one['seconds'] / ceilings['copy_bytes_s']:.0%}",
            _over(one["seconds"], one["slot_buffer_seconds"]), _over(one["seconds"], one["segment_gemm_seconds"]),
        ]
        for one in result["lora"]
    ]  # fmt: skip
    best: dict[tuple[str, int], dict[str, Any]] = {}
    for one in sorted(result["copies"], key=lambda one: -one["seconds"]):
        best[one["way"], one["slots"]] = one
    copies = [
        [
            way, slots, f"{one['bytes'] / 2**20:.1f}", f"{1e6 * one['seconds']:.0f}", one["per_program"],
            f"{one['bytes'] / one['seconds'] / ceilings[WAYS[way]]:.0%}",
        ]
        for (way, slots), one in sorted(best.items())
    ]  # fmt: skip
    header = ("way", "slots", "MiB", "us", "slots a program", "of a plain pinned copy")
    return [
        reporting.Table("LoRA kernels: decode, all modules of a layer", LORA, lora, "lora-kernels"),
        reporting.Table("Copies of scattered rows", header, copies, "row-copies"),
    ]


def aims(result: dict[str, Any]) -> list[reporting.Aim]:
    """What is aimed at and what came out; nothing for what was not measured."""
    ceilings, found = result["ceilings"], []
    at_least, at_most = reporting.Aim.at_least, reporting.Aim.at_most
    shares = [
        one["bytes"] / one["seconds"] / ceilings["copy_bytes_s"]
        for one in result["lora"]
        if one["distinct"] >= 32
    ]
    if shares:
        name = "decode with 32 adapters or more, least share of the copy bandwidth"
        found.append(at_least(name, min(shares), AIM_BANDWIDTH))
    for what, want in (("of rank", AIM_EQUAL), ("of ranks", AIM_MIXED)):
        compared = [one for one in result["lora"] if one["slot_buffer_seconds"] and f"{what} " in one["load"]]
        if compared:
            mean = statistics.fmean(one["seconds"] / one["slot_buffer_seconds"] for one in compared)
            found.append(at_most(f"time over slot buffers, adapters {what} ..., mean", mean, want))
    for way, ceiling in WAYS.items():
        best = max(one["bytes"] / one["seconds"] for one in result["copies"] if one["way"] == way)
        name = f"row copies {way}, best share of a plain pinned copy"
        found.append(at_least(name, best / ceilings[ceiling], AIM_COPY))
    return found


def _within(seconds: float, jobs: Iterator[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
    """What the jobs give that begin within so many seconds; one more at least."""
    begun, found = time.monotonic(), []
    for job in jobs:
        found.append(job())
        if time.monotonic() - begun > seconds:
            break
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, write the JSON; 1 where a check failed."""
    parser = dry_run_parser("kernel_bench", __doc__)
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="no batch begins later (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    args = parser.parse_args(arguments)
    how = bench(args.dry_run)
    shape = TINY if how.dry else LLAMA_8B
    print(f"seed {args.seed}")
    checks = check(how.device, args.seed)
    faults = [one for one in checks if one["fault"]]
    print(f"{len(checks)} cases, {len(faults)} wrong", *(f"\n  {one}" for one in faults))
    sizes = [(1, 16, 32)] if how.dry else [(1, 128, 128), (1, 256, 64), (4, 128, 128), (4, 256, 64)]
    configs = [
        paged_lora.Config(splits=splits, in_block=block, out_block=out) for splits, block, out in sizes
    ]
    seen = attention.flashinfer(args.seed, how.device)
    print("FlashInfer's attention over the pool:", seen)
    result: dict[str, Any] = {
        "dry_run": how.dry, "seed": args.seed, "checks": checks, "ceilings": how.ceilings(),
        "slot_buffers": peers.CSGMV.available(), "segment_gemm": peers.SEGMENT_GEMM.available(), "attention": seen,
        "lora": _within(args.seconds, (partial(lora, how, shape, load, configs) for load in loads(how.dry))),
        "copies": copies(how, shape),
    }  # fmt: skip
    finish(args.json, "Kernels on a GPU", tables(result), aims(result), result, how.device)
    return 1 if faults or "fault" in seen else 0


if __name__ == "__main__":
    raise SystemExit(main())
