"""Results of the paper's experiments as tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from elora_sglang.eval.reproduction import claims, gap, plan, reasons
from elora_sglang.eval.reproduction.claims import Results, mean_ttft
from elora_sglang.eval.reproduction.scene import RESIDENT
from elora_sglang.eval.sim.systems import WITHOUT
from elora_sglang.eval.support.reporting import Table

#: Kinds of results that vary one parameter of a scene.
VARIED = {"scarce": "memory", "many": "adapters", "skew": "skew", "drift": "drift_s"}
#: Baselines that a table of scenes shows; ``vllm-split`` is not tuned, ``static`` is in the scenes with less memory.
SHOWN = ("vllm", "vllm-split", "s-lora", "hicache", "static")
SCENE_HEADER = (
    "peak vllm", *SHOWN[1:], "elora", "TTFT / vllm", *(f"/ {name}" for name in SHOWN[1:]), "/ all resident",
    "invalid KV of vllm", "of the split",
)  # fmt: skip
CENTRE_HEADER = (
    "system", "knob", "TTFT ms", "P50", "P99", "TPOT", "KV dev %", "host %", "LoRA dev %", "host %", "invalid %",
    "restore s",
)  # fmt: skip


def tables(results: Results) -> Iterator[Table]:
    """One for each kind of result there is; the claims first, where all that they need is there."""
    if plan.complete(set(results)):
        explained = reasons.explained(claims.rows(results), reasons.read(reasons.LATEST))
        yield Table("The paper's claims, simulated", claims.HEADER, explained, "claims")
    if "grid" in results:
        yield Table(
            "The grid: peak load in turns a second (mean TTFT below 500 ms), ELORA's mean TTFT over that of each "
            "baseline at 0.5/0.7/0.8 of the baseline's peak",
            ["model, workload, adapters", *SCENE_HEADER],
            [[_scene(one["scene"]), *_scene_row(one)] for one in results["grid"]],
            "grid",
        )
    if "centre" in results:
        yield _centre(results["centre"][0])
    if "ablations" in results:
        yield _ablations(results["ablations"])
    for kind, parameter in VARIED.items():
        if kind in results:
            title = f"By {parameter}: peaks, and ELORA's mean TTFT over that of each baseline at its loads"
            rows = [[f"{one['scene'][parameter]:g}", *_scene_row(one)] for one in results[kind]]
            yield Table(title, [parameter, *SCENE_HEADER], rows, kind)
    if "burst" in results:
        yield _burst(results["burst"])
    if "gap" in results:
        yield Table(
            "Mooncake conversations, sessions held out from tuning", *gap.rows(results["gap"]), name="gap"
        )


def _scene(scene: dict[str, Any]) -> str:
    less = "" if scene.get("memory", 1.0) == 1.0 else f", {scene['memory']:g} of its memory"
    return f"{scene['machine']} {scene['workload']} {scene['adapters']}{less}"


def _scene_row(one: dict[str, Any]) -> list[str]:
    peaks = [one["peaks"].get(name) for name in (*SHOWN, "elora")]
    limit = claims.ratios([one], RESIDENT, mean_ttft)
    invalid = [claims.invalid_kv([one], base) for base in ("vllm", "vllm-split")]
    return [
        *("" if peak is None else f"{peak['rate']:.2f}" for peak in peaks),
        *(" ".join(f"{ratio:.2f}" for ratio in claims.ratios([one], base, mean_ttft)) for base in SHOWN),
        f"{statistics.fmean(limit):.2f}" if limit else "",
        *(f"{100 * statistics.fmean(shares):.0f} %" if shares else "" for shares in invalid),
    ]


def _centre(one: dict[str, Any]) -> Table:
    cells = [cell for cell in one["cells"] if cell["of"] == "hicache"]
    rows = []
    for cell in sorted(cells, key=lambda cell: mean_ttft(cell["figures"])):
        figures = cell["figures"]
        rows.append([
            cell["system"], " ".join(str(value) for value in one["knobs"].get(cell["system"], {}).values()),
            *(f"{1000 * figures['ttft'][key]:.0f}" for key in ("mean", "p50", "p99")),
            f"{1000 * figures['tpot']['mean']:.1f}",
            *(f"{100 * figures[of][tier]:.0f}" for of in ("kv_hits", "adapter_hits") for tier in ("device", "host")),
            f"{100 * figures['invalid_kv']:.0f}", f"{figures['restore_s']:.1f}",
        ])  # fmt: skip
    what = f"all systems and policies at {cells[0]['load']:g} of HiCache's peak, tuned"
    return Table(f"The grid's centre, {_scene(one['scene'])}: {what}", CENTRE_HEADER, rows, "centre")


def _ablations(found: list[dict[str, Any]]) -> Table:
    places = [(one, load) for one in found for load in dict.fromkeys(c["load"] for c in one["cells"])]
    names = dict.fromkeys(c["system"] for one in found for c in one["cells"])
    rows = []
    for name in (name for name in names if name == "lru" or name.startswith(WITHOUT)):
        row = [name.removeprefix("elora-")]
        for one, load in places:
            times = {c["system"]: mean_ttft(c["figures"]) for c in one["cells"] if c["load"] == load}
            row.append(f"{times[name] / times['elora']:.3f}" if name in times else "")
        rows.append(row)
    header = [f"{_scene(one['scene'])}, {load:g} of HiCache's peak" for one, load in places]
    return Table("What each part is worth", ["mean TTFT over elora's", *header], rows, "ablations")


def _burst(found: list[dict[str, Any]]) -> Table:
    rows = [
        [
            name, f"{eight['requests']}", f"{1000 * eight['p50']:.0f}", f"{1000 * sixteen['p50']:.0f}",
            f"{sixteen['p50'] / eight['p50']:.2f}",
        ]
        for one in found
        for name, parts in one.items()
        for eight, sixteen in [(parts["8"], parts["16"])]
    ]  # fmt: skip
    title = "sglang#13349: median TTFT over 8 adapters and over 16, memory of 8 buffers"
    return Table(title, ["system", "requests a part", "8, ms", "16, ms", "ratio"], rows, "burst")
