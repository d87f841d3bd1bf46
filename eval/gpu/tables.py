"""What the GPU scripts print and the report shows: tables from their figures, and one form for their JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elora_sglang.eval.support import reporting

LORA = (
    "adapters", "rows", "skew", "distinct", "us a layer", "of copy bandwidth", "over csgmv",
    "over SegmentGEMM (no graph)",
)  # fmt: skip
DRY = "a dry run: these times mean nothing"


def _over(seconds: float, other: float | None) -> str:
    return "not compared" if not other else f"{seconds / other:.2f}x"


def kernels(result: Mapping[str, Any]) -> list[reporting.Table]:
    """LoRA and copies of ``kernel_bench``."""
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
    links = {"to the device": ceilings["to_device_bytes_s"], "to the host": ceilings["to_host_bytes_s"]}
    copies = [
        [
            way, slots, f"{one['bytes'] / 2**20:.1f}", f"{1e6 * one['seconds']:.0f}", one["per_program"],
            f"{one['bytes'] / one['seconds'] / links[way]:.0%}",
        ]
        for (way, slots), one in sorted(best.items())
    ]  # fmt: skip
    header = ("way", "slots", "MiB", "us", "slots a program", "of a plain pinned copy")
    return [
        reporting.Table("LoRA kernels: decode, all modules of a layer", LORA, lora, "lora-kernels"),
        reporting.Table("Copies of scattered rows", header, copies, "row-copies"),
    ]


def loop(result: Mapping[str, Any]) -> list[reporting.Table]:
    """The three experiments of ``loop_bench``."""
    switch = [
        [one["rank"], one["slots"], f"{one['bytes'] / 2**20:.1f}", f"{1e3 * one['seconds']:.2f}", f"{one['ratio']:.2f}"]
        for one in result["switch"]
    ]  # fmt: skip
    overlap = result["overlap"]
    hidden = [
        [name.replace("_", " "), f"{1e3 * seconds:.1f}"] for name, seconds in overlap["seconds"].items()
    ]
    hidden.append(["share of the copy that computing hides", f"{overlap['copy_hidden']:.0%}"])
    burst = [
        [name, count, part["requests"], f"{1e3 * part['p50']:.0f}", f"{1e3 * part['most']:.0f}"]
        for name, parts in result["burst"].items()
        if isinstance(parts, dict)
        for count, part in parts.items()
        if isinstance(part, dict)
    ]
    first = f"First token after {overlap['context']} tokens of context, {overlap['new']} new ones"
    bursts = ("", "adapters", "requests", "P50 ms", "most")
    loads = ("rank", "slots", "MiB", "ms", "over bytes / link")
    return [
        reporting.Table("An adapter from the host to the device", loads, switch, "switch"),
        reporting.Table(first, ("what it needs is on the", "ms"), hidden, "overlap"),
        reporting.Table("Requests to half of the adapters, then to all", bursts, burst, "loop-burst"),
    ]


def finish(
    path: Path,
    title: str,
    tables: Sequence[reporting.Table],
    aims: Sequence[reporting.Aim],
    data: Mapping[str, Any],
    about: Mapping[str, object],
) -> None:
    """Print the tables and aims, and write the JSON that ``report`` reads. ``about``: the device, beside ``run``."""
    dry = bool(data.get("dry_run"))
    result = reporting.as_json(tables, aims, {"title": f"{title} ({DRY})" if dry else title, **data}, about)
    path.write_text(json.dumps(result, indent=1) + "\n")
    reporting.show(tables, aims)
    print(DRY if dry else f"written to {path.name}")
