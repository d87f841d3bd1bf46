"""Results of the paper's experiments as tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from elora_sglang.eval.reproduction import claims, gap
from elora_sglang.eval.reproduction.claims import Results, mean_ttft
from elora_sglang.eval.sim.systems import WITHOUT
from elora_sglang.eval.support.reporting import Table


def tables(results: Results) -> Iterator[Table]:
    """One for each kind of result there is."""
    if "grid" in results:
        yield Table(
            "The grid: peak load in turns a second (mean TTFT below 500 ms), ELORA's mean TTFT over that of each "
            "baseline at 0.5/0.7/0.8 of the baseline's peak",
            ["model, workload, adapters", *SCENE_HEADER],
            [[_scene(one["scene"]), *_scene_row(one)] for one in results["grid"]],
        )
    if "centre" in results:
        yield _centre(results["centre"][0])
    if "ablations" in results:
        yield _ablations(results["ablations"])
    for kind, parameter in (
        ("scarce", "memory"),
        ("many", "adapters"),
        ("skew", "skew"),
        ("drift", "drift_s"),
    ):
        if kind in results:
            yield Table(
                f"By {parameter}: peaks, and ELORA's mean TTFT over that of each baseline at its loads",
                [parameter, *SCENE_HEADER],
                [[f"{one['scene'][parameter]:g}", *_scene_row(one)] for one in results[kind]],
            )
    if "burst" in results:
        yield _burst(results["burst"])
    if "gap" in results:
        yield Table("Mooncake conversations, sessions held out from tuning", *gap.rows(results["gap"]))


#: Baselines that a table of scenes shows; ``vllm-split`` is not tuned, ``static`` is in the scenes with less memory.
SHOWN = ("vllm", "vllm-split", "s-lora", "hicache", "static")
SCENE_HEADER = (
    "peak vllm", *SHOWN[1:], "elora", "TTFT / vllm", *(f"/ {name}" for name in SHOWN[1:]), "/ all resident",
    "invalid KV of vllm", "of the split",
)  # fmt: skip


def _scene(scene: dict[str, Any]) -> str:
    less = "" if scene.get("memory", 1.0) == 1.0 else f", {scene['memory']:g} of its memory"
    return f"{scene['machine']} {scene['workload']} {scene['adapters']}{less}"


def _scene_row(one: dict[str, Any]) -> list[str]:
    row = []
    for name in (*SHOWN, "elora"):
        peak = one["peaks"].get(name)
        row.append("" if peak is None else f"{peak['rate']:.2f}")
    for base in SHOWN:
        found = claims.ratios([one], base, mean_ttft)
        row.append(" ".join(f"{ratio:.2f}" for ratio in found))
    limit = claims.over_resident([one], mean_ttft)
    row.append(f"{statistics.fmean(limit):.2f}" if limit else "")
    for base in ("vllm", "vllm-split"):
        invalid = [c["figures"]["invalid_kv"] for c in one["cells"] if c["system"] == c["of"] == base]
        row.append(f"{100 * statistics.fmean(invalid):.0f} %" if invalid else "")
    return row


def _centre(one: dict[str, Any]) -> Table:
    rows = []
    cells = [cell for cell in one["cells"] if cell["of"] == "hicache"]
    for cell in sorted(cells, key=lambda cell: mean_ttft(cell["figures"])):
        figures = cell["figures"]
        knobs = " ".join(str(value) for value in one["knobs"].get(cell["system"], {}).values())
        rows.append([
            cell["system"], knobs,
            *(f"{1000 * figures['ttft'][key]:.0f}" for key in ("mean", "p50", "p99")),
            f"{1000 * figures['tpot']['mean']:.1f}",
            *(f"{100 * figures['kv_hits'][tier]:.0f}" for tier in ("device", "host")),
            *(f"{100 * figures['adapter_hits'][tier]:.0f}" for tier in ("device", "host")),
            f"{100 * figures['invalid_kv']:.0f}",
            f"{figures['restore_s']:.1f}",
        ])  # fmt: skip
    load = cells[0]["load"]
    return Table(
        f"The grid's centre, {_scene(one['scene'])}: all systems and policies at {load:g} of HiCache's peak, tuned",
        ["system", "knob", "TTFT ms", "P50", "P99", "TPOT", "KV dev %", "host %", "LoRA dev %", "host %",
         "invalid %", "restore s"],
        rows,
    )  # fmt: skip


def _ablations(found: list[dict[str, Any]]) -> Table:
    places = [(one, load) for one in found for load in dict.fromkeys(c["load"] for c in one["cells"])]
    names = [name for name in dict.fromkeys(c["system"] for one in found for c in one["cells"])
             if name == "lru" or name.startswith(WITHOUT)]  # fmt: skip
    rows = []
    for name in names:
        row = [name.removeprefix("elora-")]
        for one, load in places:
            times = {c["system"]: mean_ttft(c["figures"]) for c in one["cells"] if c["load"] == load}
            row.append(f"{times[name] / times['elora']:.3f}" if name in times else "")
        rows.append(row)
    header = ["mean TTFT over elora's"]
    header += [f"{_scene(one['scene'])}, {load:g} of HiCache's peak" for one, load in places]
    return Table("What each part is worth", header, rows)


def _burst(found: list[dict[str, Any]]) -> Table:
    rows = []
    for one in found:
        for name, parts in one.items():
            eight, sixteen = parts["8"], parts["16"]
            rows.append([
                name, f"{eight['requests']}", f"{1000 * eight['p50']:.0f}", f"{1000 * sixteen['p50']:.0f}",
                f"{sixteen['p50'] / eight['p50']:.2f}",
            ])  # fmt: skip
    return Table(
        "sglang#13349: median TTFT over 8 adapters and over 16, memory of 8 buffers",
        ["system", "requests a part", "8, ms", "16, ms", "ratio"],
        rows,
    )
