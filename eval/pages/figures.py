"""Pictures of results. Each function returns a matplotlib figure, or None where the data has nothing to draw."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

#: One colour a system, the same in all figures; others take grey.
COLOURS = {
    "stock": "#8c8c8c", "stock-overlap": "#bdbdbd", "hicache": "#4c78a8", "vllm": "#72b7b2", "vllm-offload": "#3a8f8a",
    "s-lora": "#b279a2", "static": "#e7ba52", "lru": "#d67195", "lfu": "#c49c94", "paper": "#54a24b",
    "elora": "#e45756", "clairvoyant": "#222222",
}  # fmt: skip
USES = (("adapters", "#e45756"), ("kv", "#4c78a8"), ("running", "#72b7b2"), ("free", "#eeeeee"))


def colour(name: str) -> str:
    """Of a system."""
    return COLOURS.get(name, "#999999")


def _figure(width: float = 7.0, height: float = 3.6) -> Figure:
    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def ttft_bars(systems: dict[str, Any]) -> Figure:
    """Mean TTFT with P99 as a mark, by system; a logarithmic axis."""
    figure = _figure()
    axes = figure.subplots()
    names = list(systems)
    means = [1000 * systems[name]["ttft"]["mean"] for name in names]
    axes.bar(names, means, color=[colour(name) for name in names])
    axes.plot(
        names, [1000 * systems[name]["ttft"]["p99"] for name in names], "k_", markersize=14, label="P99"
    )
    axes.set_yscale("log")
    axes.set_ylabel("TTFT, ms")
    axes.tick_params(axis="x", rotation=30)
    axes.legend(frameon=False)
    return figure


def restore_bars(systems: dict[str, Any], bound: float | None) -> Figure:
    """Seconds to restore by system, with the lower bound as a line."""
    figure = _figure()
    axes = figure.subplots()
    names = list(systems)
    axes.bar(names, [systems[name]["restore_s"] for name in names], color=[colour(name) for name in names])
    if bound is not None:
        axes.axhline(bound, color="black", linestyle="--", linewidth=1, label="no policy is below")
        axes.legend(frameon=False)
    axes.set_ylabel("seconds to restore")
    axes.tick_params(axis="x", rotation=30)
    return figure


def ttft_cdf(systems: dict[str, Any]) -> Figure | None:
    """Share of requests whose first token came within so many seconds."""
    drawn = {name: one["series"] for name, one in systems.items() if "series" in one}
    if not drawn:
        return None
    figure = _figure()
    axes = figure.subplots()
    for name, series in drawn.items():
        axes.plot(
            [max(1000 * s, 0.1) for s in series["ttft_percentiles"]],
            range(101),
            color=colour(name),
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xlabel("TTFT, ms")
    axes.set_ylabel("% of requests")
    axes.legend(frameon=False, fontsize=8)
    return figure


def memory(series: dict[str, Any]) -> Figure:
    """Device slots over time: adapters, KV of the tree, KV of running requests, free."""
    figure = _figure()
    axes = figure.subplots()
    found = series["memory"]
    axes.stackplot(
        found["seconds"],
        [found[use] for use, _ in USES],
        labels=[use for use, _ in USES],
        colors=[shade for _, shade in USES],
    )
    axes.set_xlabel("seconds")
    axes.set_ylabel("device slots")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def residency(series: dict[str, Any]) -> Figure | None:
    """Which adapters were on the device when; one row an adapter, those that were there most on top."""
    rows = [[int(digit) for digit in text] for text in series["residency"].values()]
    if not rows or not rows[0]:
        return None
    figure = _figure(7.0, 0.6 + 0.08 * max(len(rows), 12))
    axes = figure.subplots()
    ends = series["residency_s"]
    axes.imshow(
        rows, aspect="auto", cmap="Reds", interpolation="nearest", extent=(ends[0], ends[-1], len(rows), 0)
    )
    axes.set_xlabel("seconds")
    axes.set_ylabel("adapter")
    return figure


def ttft_over_rate(cells: Sequence[dict[str, Any]]) -> Figure:
    """Mean TTFT over the rate asked, by system; bars from the least to the largest repeat."""
    figure = _figure()
    axes = figure.subplots()
    for name in dict.fromkeys(cell["name"] for cell in cells):
        by_rate: dict[float, list[float]] = {}
        for cell in cells:
            if cell["name"] == name:
                by_rate.setdefault(cell["rate_asked"], []).append(1000 * cell["summary"]["ttft_mean"])
        rates = sorted(by_rate)
        means = [statistics.fmean(by_rate[rate]) for rate in rates]
        spread = [
            [m - min(by_rate[r]) for r, m in zip(rates, means, strict=True)],
            [max(by_rate[r]) - m for r, m in zip(rates, means, strict=True)],
        ]
        axes.errorbar(
            rates, means, yerr=spread, color=colour(name), label=name, marker="o", markersize=3, capsize=2
        )
    axes.set_yscale("log")
    axes.set_xlabel("turns a second asked")
    axes.set_ylabel("mean TTFT, ms")
    axes.legend(frameon=False, fontsize=8)
    return figure


def ablations(cells: Sequence[dict[str, Any]]) -> Figure | None:
    """Mean TTFT without one part each, over that of the whole beside it; bars from the least to the largest repeat."""
    ratios = ablation_ratios(cells)
    if not ratios:
        return None
    figure = _figure(7.0, 1.0 + 0.28 * len(ratios))
    axes = figure.subplots()
    names = sorted(ratios, key=lambda name: statistics.fmean(ratios[name]))
    means = [statistics.fmean(ratios[name]) for name in names]
    spread = [
        [m - min(ratios[n]) for n, m in zip(names, means, strict=True)],
        [max(ratios[n]) - m for n, m in zip(names, means, strict=True)],
    ]
    axes.barh(names, means, xerr=spread, color=colour("elora"), capsize=2)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("mean TTFT over that of elora")
    return figure


def ablation_ratios(cells: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """By part, one ratio a repeat. ``elora#N`` in the cells is the whole, in turn with the parts of its group."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        if cell["name"].startswith("elora#"):
            groups.setdefault(cell["name"], [])  # a group's first cell is the whole
        groups[next(reversed(groups))].append(cell)
    found: dict[str, list[float]] = {}
    for label, group in groups.items():
        whole = {cell["repeat"]: cell["summary"]["ttft_mean"] for cell in group if cell["name"] == label}
        for cell in group:
            if cell["name"] != label:
                part = cell["name"].removeprefix("elora-without-")
                found.setdefault(part, []).append(cell["summary"]["ttft_mean"] / whole[cell["repeat"]])
    return found


def curve(points: Sequence[dict[str, Any]]) -> Figure | None:
    """Mean TTFT over rate by system, simulated; a line ends where a system was overloaded."""
    if not points:
        return None
    figure = _figure()
    axes = figure.subplots()
    for name in dict.fromkeys(point["system"] for point in points):
        mine = sorted((p["rate"], 1000 * p["ttft"]["mean"]) for p in points if p["system"] == name)
        axes.plot(*zip(*mine, strict=True), color=colour(name), label=name, marker="o", markersize=3)
    axes.axhline(500, color="black", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.set_xlabel("turns a second")
    axes.set_ylabel("mean TTFT, ms")
    axes.legend(frameon=False, fontsize=8)
    return figure


def peaks(scenes: Sequence[dict[str, Any]]) -> Figure | None:
    """Peak load over that of the first system, one group of bars a scene."""
    if not scenes:
        return None
    names = [name for name in scenes[0]["peaks"] if scenes[0]["peaks"][name]["rate"]]
    figure = _figure(9.0, 4.2)
    axes = figure.subplots()
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        values = [
            one["peaks"][name]["rate"] / one["peaks"][names[0]]["rate"]
            if one["peaks"][names[0]]["rate"]
            else 0
            for one in scenes
        ]
        axes.bar(
            [x + place * width for x in range(len(scenes))], values, width, color=colour(name), label=name
        )
    labels = [
        f"{one['scene']['machine']}\n{one['scene']['workload']} {one['scene']['adapters']}" for one in scenes
    ]
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(scenes))], labels, rotation=90, fontsize=6)
    axes.set_ylabel(f"peak load over {names[0]}'s")
    axes.legend(frameon=False, fontsize=8, ncols=len(names))
    return figure


def share_bars(header: Sequence[str], rows: Sequence[Sequence[str]], unit: str) -> Figure | None:
    """A table of "value ± width" cells as grouped bars, one group a row."""

    def read(cell: str) -> tuple[float, float]:
        value, width = cell.split(" ± ")
        return float(value), float(width)

    return _grouped_bars(header, rows, unit, read, start=0.0)


def ratio_bars(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Figure | None:
    """A table of ratios as grouped bars around 1, one group a row; an empty cell is 1."""
    return _grouped_bars(header, rows, header[0], lambda cell: (float(cell or 1.0), 0.0), start=1.0)


def _grouped_bars(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    unit: str,
    read: Callable[[str], tuple[float, float]],
    *,
    start: float,
) -> Figure | None:
    """Bars that begin at ``start``. ``read``: value of a cell, and half the width of its interval."""
    if not rows:
        return None
    figure = _figure(8.0, 1.0 + 0.32 * len(rows))
    axes = figure.subplots()
    height = 0.8 / (len(header) - 1)
    for place, label in enumerate(header[1:]):
        cells = [read(row[place + 1]) for row in rows]
        axes.barh(
            [-(y + place * height) for y in range(len(rows))],
            [value - start for value, _ in cells],
            height,
            left=start,
            xerr=[width for _, width in cells],
            label=label,
        )
    axes.set_yticks([-(y + 0.4 - height / 2) for y in range(len(rows))], [row[0] for row in rows], fontsize=7)
    axes.axvline(start, color="black", linewidth=1)
    axes.set_xlabel(unit)
    axes.legend(frameon=False, fontsize=7)
    return figure


def bandwidth(batches: Sequence[dict[str, Any]], ceiling: float) -> Figure | None:
    """Share of the copy bandwidth that LoRA kernels reach, over the distinct adapters of a batch."""
    if not batches:
        return None
    figure = _figure()
    axes = figure.subplots()
    kinds = list(dict.fromkeys(one["load"].partition(" of ")[2] for one in batches))
    for kind in kinds:
        mine = [one for one in batches if one["load"].partition(" of ")[2] == kind]
        axes.plot(
            [one["distinct"] for one in mine],
            [100 * one["bytes"] / one["seconds"] / ceiling for one in mine],
            "o",
            markersize=3,
            label=kind,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("distinct adapters in the batch")
    axes.set_ylabel("% of the copy bandwidth")
    axes.legend(frameon=False, fontsize=8)
    return figure


def over_slots(batches: Sequence[dict[str, Any]]) -> Figure | None:
    """Time of the paged kernels over those on slot buffers; None where nothing was compared."""
    peers = {"csgmv": "slot_buffer_seconds", "SegmentGEMM": "segment_gemm_seconds"}
    drawn = {name: key for name, key in peers.items() if any(one[key] for one in batches)}
    if not drawn:
        return None
    figure = _figure(8.0, 4.2)
    axes = figure.subplots()
    for name, key in drawn.items():
        axes.plot(
            [f"{one['load']}\n{one['rows']} rows, skew {one['skew']:g}" for one in batches if one[key]],
            [one["seconds"] / one[key] for one in batches if one[key]],
            "o",
            markersize=3,
            label=f"over {name}",
        )
    axes.axhline(1.0, color="black", linewidth=1)
    axes.tick_params(axis="x", rotation=90, labelsize=5)
    axes.set_ylabel("time of the paged kernels")
    axes.legend(frameon=False, fontsize=8)
    return figure


def copies(found: Sequence[dict[str, Any]], ceilings: dict[str, float]) -> Figure | None:
    """Bytes a second of row copies by their size, and of plain pinned copies as lines."""
    if not found:
        return None
    figure = _figure()
    axes = figure.subplots()
    for way, ceiling, shade in (
        ("to the device", "to_device_bytes_s", "#e45756"), ("to the host", "to_host_bytes_s", "#4c78a8"),
    ):  # fmt: skip
        best: dict[float, float] = {}
        for one in found:
            if one["way"] == way:
                size = one["bytes"] / 2**20
                best[size] = max(best.get(size, 0.0), one["bytes"] / one["seconds"] / 1e9)
        axes.plot(*zip(*sorted(best.items()), strict=True), color=shade, marker="o", markersize=3, label=way)
        axes.axhline(ceilings[ceiling] / 1e9, color=shade, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("MiB")
    axes.set_ylabel("GB/s")
    axes.legend(frameon=False, fontsize=8)
    return figure
