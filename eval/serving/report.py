"""The table, the aims and the JSON of a live comparison."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from elora_sglang.core.policies.base import LORA_SHARE
from elora_sglang.eval.serving import statistics as figures
from elora_sglang.eval.serving.systems import STOCK
from elora_sglang.eval.support import reporting

HEADER = (
    "working set, load, system",
    "TTFT ms",
    "95 % interval",
    "p50",
    "p95",
    "p99",
    "TPOT ms",
    "KV dev %",
    "KV host %",
    "adapter dev %",
    "invalid %",
    "moved GB",
    "turns/s",
    "÷ baseline",
    "95 % interval",
)
AIM_STOCK, AIM_HICACHE, AIM_STATIC_INVALID = 0.45, 0.70, 0.20
#: The last is what servers before 0.2 called it.
ADAPTER_LOADS = ("adapter_loads", "elora.done.adapter_loads", "elora.adapter_loads")
MOVED = ("moved_load", "moved_save", "elora.loaded_bytes", "elora.saved_bytes")

Cells = list[dict[str, Any]]


def title(settings: Any, data: dict[str, Any]) -> str:
    """What was measured, with the link, in a few lines."""
    budget, ratio = data["budget"], data["profile"]
    per_token = (
        f", prefill {1e6 * data['prefill_s_per_token']:.0f} µs a token" if data["prefill_s_per_token"] else ""
    )
    link = f"{data['link_gbps']:.3f} GB/s each way" if data["link_gbps"] else "off"
    return (
        f"chat, {settings.repeats} interleaved repeats of {settings.seconds:g} s a load, after a warm-up: device "
        f"{budget['device_tokens']} and host {budget['host_tokens']} KV tokens for each, "
        f"{budget['adapters']} adapters\n"
        f"emulated link {link}{per_token}; proportions of: {ratio['name']} ({ratio['sources']['default']})\n"
        f"tuned: {data['chosen']}{_invalid(data['tuning'])}; capacity, turns/s: "
        f"{ {k: round(v, 2) for k, v in data['capacities'].items()} }"
    )


def _invalid(tuning: Cells) -> str:
    """Invalid KV by share of ``static``, as tuning found it; empty if it was not tuned."""
    shares = [
        f"{100 * e['invalid_kv']:.0f} % at {e['setting']:g} ({e['factor']:g}x)"
        for e in tuning
        if "invalid_kv" in e
    ]
    return f" (invalid KV of static meanwhile: {', '.join(shares)})" if shares else ""


#: Working set, whose capacity the load is a share of, and the share.
Place = tuple[float, str, float]


def _groups(cells: Cells) -> dict[Place, dict[str, Cells]]:
    found: dict[Place, dict[str, Cells]] = {}
    for cell in cells:
        place = cell["factor"], cell["of"], cell["load"]
        found.setdefault(place, {}).setdefault(cell["name"], []).append(cell)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "stock", item[0][2])))


def _where(place: Place) -> str:
    factor, of, share = place
    return f"{factor:g}x, {share:g} of {of}"


def reference(group: dict[str, Cells], of: str) -> str:
    """What the others are compared with: the better stock by mean TTFT, or the system that the load is a share of."""
    there = [name for name in ("stock", "stock-overlap") if name in group] if of == "stock" else [of]
    return min(there, key=lambda name: statistics.fmean(figures.pooled(group[name], "ttft_mean")))


def _mean(cells: Cells, key: str) -> float:
    return statistics.fmean(figures.pooled(cells, key))


def moved_bytes(cells: Cells) -> float | None:
    """Mean bytes a cell that crossed the link, both directions; None where the server does not tell."""
    sums = [[c["counters"][key] for key in MOVED if key in c["counters"]] for c in cells]
    return statistics.fmean(sum(s) for s in sums) if all(sums) else None


def adapter_hits(cells: Cells) -> float | None:
    """Share of a cell's requests for which no adapter had to be brought to the device.

    Counted from the other side, alike in every system: one minus adapters loaded over requests, at least 0; what
    was loaded ahead and never used counts as a miss. None where the server does not tell.
    """
    shares = []
    for cell in cells:
        loads = next((cell["counters"][key] for key in ADAPTER_LOADS if key in cell["counters"]), None)
        if loads is None:
            return None
        shares.append(max(0.0, 1 - loads / cell["summary"]["requests"]))
    return statistics.fmean(shares)


def _row(label: str, cells: Cells, reference: Cells | None) -> list[str]:
    mean, low, high = figures.interval(figures.pooled(cells, "ttft_mean"))
    moved = moved_bytes(cells)
    invalid = [c["summary"]["invalid_kv"] for c in cells if "invalid_kv" in c["summary"]]
    adapters = adapter_hits(cells)
    versus = ["", ""]
    if reference is not None and reference is not cells:
        middle, least, most = ratio_of(cells, reference)
        versus = [f"{middle:.2f}", f"{least:.2f} to {most:.2f}"]
    return [
        label,
        f"{1000 * mean:.0f}",
        f"{1000 * max(0.0, low):.0f} to {1000 * high:.0f}",
        *(f"{1000 * _mean(cells, key):.0f}" for key in ("ttft_p50", "ttft_p95", "ttft_p99")),
        f"{1000 * _mean(cells, 'tpot_mean'):.1f}",
        f"{100 * _mean(cells, 'hit_device'):.0f}",
        f"{100 * _mean(cells, 'hit_host'):.0f}",
        "-" if adapters is None else f"{100 * adapters:.0f}",
        f"{100 * statistics.fmean(invalid):.1f}" if invalid else "-",
        "-" if moved is None else f"{moved / 1e9:.2f}",
        f"{_mean(cells, 'rate'):.2f}",
        *versus,
    ]


def ratio_of(ours: Cells, theirs: Cells) -> tuple[float, float, float]:
    """Paired ratio of mean TTFT with its interval."""
    return figures.ratio(figures.pooled(ours, "ttft_mean"), figures.pooled(theirs, "ttft_mean"))


def rows(data: dict[str, Any]) -> list[list[str]]:
    """One row per working set, load and system; then the ablations, each against the elora beside it."""
    found = []
    for place, group in _groups(data["cells"]).items():
        against = group[reference(group, place[1])]
        for name, cells in group.items():
            found.append(_row(f"{_where(place)}: {name}", cells, against))
    for place, group in _groups(data["ablations"]).items():
        plain: Cells = []
        for name, cells in group.items():
            if name.startswith("elora#"):
                plain = cells
            found.append(_row(f"{_where(place)}: {name} (÷ elora)", cells, plain))
    return found


def differing(data: dict[str, Any]) -> tuple[int, int, list[str]]:
    """Answers that differ from the reference's, over all systems and cells: (different, compared, examples)."""
    wrong = compared = 0
    examples: list[str] = []
    for (_, of, _), group in _groups(data["cells"]).items():
        known = {cell["repeat"]: cell["answers"] for cell in group[of]}
        for name, cells in group.items():
            for cell in cells if name != of else []:
                bad, seen, where = figures.differing(cell["answers"], known[cell["repeat"]])
                wrong, compared = wrong + bad, compared + seen
                examples += [f"{name} {key}" for key in where]
    return wrong, compared, examples[:10]


def aims(data: dict[str, Any]) -> list[reporting.Aim]:
    """The issue's aims, for every working set and load; those of systems that were not compared are left out."""
    found = []
    for place, group in _groups(data["cells"]).items():
        where = _where(place)
        if "elora" in group:
            against = reference(group, place[1])
            limit, name = (
                (AIM_STOCK, "the best stock") if place[1] == "stock" else (AIM_HICACHE, "tuned HiCache")
            )
            value = ratio_of(group["elora"], group[against])[0]
            found.append(
                reporting.Aim(f"{where}: mean TTFT of elora over {name}", value, limit, value <= limit)
            )
        for name, cells in group.items():
            shares = [c["summary"]["invalid_kv"] for c in cells if "invalid_kv" in c["summary"]]
            if name in STOCK or not shares:
                continue
            if name != "static":  # whose best share may hold all adapters, so that nothing is invalid
                value = statistics.fmean(shares)
                found.append(reporting.Aim(f"{where}: invalid KV of {name}", value, 0, value == 0))
    for entry in data["tuning"]:
        if entry["system"] == "static" and entry["setting"] == LORA_SHARE and "invalid_kv" in entry:
            where = f"{entry['factor']:g}x, tuning: invalid KV of static at its default share {LORA_SHARE:g}"
            value, aim = entry["invalid_kv"], f"at least {AIM_STATIC_INVALID:g}"
            found.append(reporting.Aim(where, value, aim, value >= AIM_STATIC_INVALID))
    wrong, compared, _ = differing(data)
    if compared:
        found.append(
            reporting.Aim(f"answers that differ from the baseline's, of {compared}", wrong, 0, wrong == 0)
        )
    return found


def plain(data: dict[str, Any]) -> dict[str, Any]:
    """The data without single answers, which stay in the cells' files."""
    wrong, compared, examples = differing(data)
    drop: Sequence[str] = ("answers", "ttft")
    return data | {
        "cells": [{k: v for k, v in c.items() if k not in drop} for c in data["cells"]],
        "ablations": [{k: v for k, v in c.items() if k not in drop} for c in data["ablations"]],
        "answers": {"different": wrong, "compared": compared, "examples": examples},
    }
