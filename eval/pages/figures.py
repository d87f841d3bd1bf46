"""Pictures of results. Each function returns a matplotlib figure, or None where the data has nothing to draw."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: One colour a system or way, the same in all figures; others take grey.
COLOURS = {
    "stock": "#8c8c8c", "stock-overlap": "#bdbdbd", "hicache": "#4c78a8", "vllm": "#72b7b2", "vllm-offload": "#3a8f8a",
    "s-lora": "#b279a2", "static": "#e7ba52", "lru": "#d67195", "lfu": "#c49c94", "paper": "#54a24b",
    "elora": "#e45756", "clairvoyant": "#222222", "to the device": "#e45756", "to the host": "#4c78a8",
}  # fmt: skip
USES = {"adapters": "#e45756", "kv": "#4c78a8", "running": "#72b7b2", "free": "#eeeeee"}


def colour(name: str) -> str:
    """Of a system or way."""
    return COLOURS.get(name, "#999999")


def _axes(x: str = "", y: str = "", *, width: float = 7.0, height: float = 3.6, **more: Any) -> Axes:
    """Axes of a new figure, with their labels; ``more``: for ``Axes.set``."""
    axes = Figure(figsize=(width, height), dpi=120, layout="constrained").subplots()
    axes.set(xlabel=x, ylabel=y, **more)
    return axes


def _line(axes: Axes, at: float, color: str = "black", linestyle: str = "-", label: str = "") -> None:
    """What values are compared with, all along the other axis."""
    axes.axhline(at, color=color, linestyle=linestyle, linewidth=1, label=label)


def _drawn(axes: Axes, *, legend: bool = True, **how: Any) -> Figure:
    if legend:
        axes.legend(frameon=False, **({"fontsize": 8} | how))
    figure = axes.figure
    assert isinstance(figure, Figure)
    return figure


def _spread(groups: Iterable[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """Mean of each group, and how far its least and its largest value lie from it."""
    groups = list(groups)
    means = [statistics.fmean(group) for group in groups]
    pairs = list(zip(means, groups, strict=True))
    return means, [[mean - min(group) for mean, group in pairs], [max(group) - mean for mean, group in pairs]]


def _bars(axes: Axes, systems: dict[str, Any], values: Sequence[float]) -> None:
    axes.bar(list(systems), values, color=[colour(name) for name in systems])
    axes.tick_params(axis="x", rotation=30)


def ttft_bars(systems: dict[str, Any]) -> Figure:
    """Mean TTFT with P99 as a mark, by system; a logarithmic axis."""
    axes = _axes(y="TTFT, ms", yscale="log")
    means, tails = ([1000 * one["ttft"][key] for one in systems.values()] for key in ("mean", "p99"))
    _bars(axes, systems, means)
    axes.plot(list(systems), tails, "k_", markersize=14, label="P99")
    return _drawn(axes, fontsize=10)


def restore_bars(systems: dict[str, Any], bound: float | None) -> Figure:
    """Seconds to restore by system, with the lower bound as a line."""
    axes = _axes(y="seconds to restore")
    _bars(axes, systems, [one["restore_s"] for one in systems.values()])
    if bound is not None:
        _line(axes, bound, linestyle="--", label="no policy is below")
    return _drawn(axes, legend=bound is not None, fontsize=10)


#: By label: the points of a line, x beside y.
Lines = dict[str, Iterable[tuple[Any, float]]]


def _plotted(axes: Axes, lines: Lines, style: str = "-", *, coloured: bool = True) -> Axes:
    for name, points in lines.items():
        shade = colour(name) if coloured else None
        axes.plot(*zip(*points, strict=True), style, markersize=3, label=name, color=shade)
    return axes


def ttft_cdf(systems: dict[str, Any]) -> Figure | None:
    """Share of requests whose first token came within so many seconds."""
    lines: Lines = {
        name: [(max(1000 * s, 0.1), share) for share, s in enumerate(one["series"]["ttft_percentiles"])]
        for name, one in systems.items()
        if "series" in one
    }
    return _drawn(_plotted(_axes("TTFT, ms", "% of requests", xscale="log"), lines)) if lines else None


def memory(series: dict[str, Any]) -> Figure:
    """Device slots over time: adapters, KV of the tree, KV of running requests, free."""
    axes, found = _axes("seconds", "device slots"), series["memory"]
    axes.stackplot(
        found["seconds"], [found[use] for use in USES], labels=list(USES), colors=list(USES.values())
    )
    return _drawn(axes, loc="upper right")


def residency(series: dict[str, Any]) -> Figure | None:
    """Which adapters were on the device when; one row an adapter, those that were there most on top."""
    rows = [[int(digit) for digit in text] for text in series["residency"].values()]
    if not rows or not rows[0]:
        return None
    axes = _axes("seconds", "adapter", height=0.6 + 0.08 * max(len(rows), 12))
    ends = series["residency_s"]
    extent = (ends[0], ends[-1], len(rows), 0)
    axes.imshow(rows, aspect="auto", cmap="Reds", interpolation="nearest", extent=extent)
    return _drawn(axes, legend=False)


def ttft_over_rate(cells: Sequence[dict[str, Any]]) -> Figure:
    """Mean TTFT over the rate asked, by system; bars from the least to the largest repeat."""
    axes = _axes("turns a second asked", "mean TTFT, ms")
    for name in dict.fromkeys(cell["name"] for cell in cells):
        by_rate: dict[float, list[float]] = {}
        for cell in cells:
            if cell["name"] == name:
                by_rate.setdefault(cell["rate_asked"], []).append(1000 * cell["summary"]["ttft_mean"])
        rates = sorted(by_rate)
        means, spread = _spread(by_rate[rate] for rate in rates)
        axes.errorbar(
            rates, means, yerr=spread, color=colour(name), label=name, marker="o", markersize=3, capsize=2
        )
    axes.set_yscale("log")
    return _drawn(axes)


def ablations(cells: Sequence[dict[str, Any]]) -> Figure | None:
    """Mean TTFT without a part over that of the whole, one bar a part; whiskers: least and largest repeat."""
    ratios = ablation_ratios(cells)
    if not ratios:
        return None
    axes = _axes("mean TTFT over that of elora", height=1.0 + 0.28 * len(ratios))
    names = sorted(ratios, key=lambda name: statistics.fmean(ratios[name]))
    means, spread = _spread(ratios[name] for name in names)
    axes.barh(names, means, xerr=spread, color=colour("elora"), capsize=2)
    axes.axvline(1.0, color="black", linewidth=1)
    return _drawn(axes, legend=False)


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
    lines: Lines = {
        name: sorted((p["rate"], 1000 * p["ttft"]["mean"]) for p in points if p["system"] == name)
        for name in dict.fromkeys(point["system"] for point in points)
    }
    axes = _plotted(_axes("turns a second", "mean TTFT, ms", yscale="log"), lines, "-o")
    _line(axes, 500, linestyle="--")
    return _drawn(axes)


def peaks(scenes: Sequence[dict[str, Any]]) -> Figure | None:
    """Peak load over that of the first system, one group of bars a scene."""
    if not scenes:
        return None
    names = [name for name, peak in scenes[0]["peaks"].items() if peak["rate"]]
    axes = _axes(y=f"peak load over {names[0]}'s", width=9.0, height=4.2)
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        rates = [(one["peaks"][name]["rate"], one["peaks"][names[0]]["rate"]) for one in scenes]
        values = [rate / first if first else 0 for rate, first in rates]
        places = [x + place * width for x in range(len(scenes))]
        axes.bar(places, values, width, color=colour(name), label=name)
    labels = [f"{s['machine']}\n{s['workload']} {s['adapters']}" for s in (one["scene"] for one in scenes)]
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(scenes))], labels, rotation=90, fontsize=6)
    return _drawn(axes, ncols=len(names))


def table_bars(header: Sequence[str], rows: Sequence[Sequence[str]], start: float) -> Figure | None:
    """A table of "value" or "value ± width" cells as bars that begin at ``start``, one group a row.

    An empty cell is ``start``.
    """
    if not rows:
        return None
    axes = _axes(header[0], width=8.0, height=1.0 + 0.32 * len(rows))
    height = 0.8 / (len(header) - 1)
    for place, label in enumerate(header[1:]):
        cells = [row[place + 1].partition(" ± ") for row in rows]
        lengths = [float(value or start) - start for value, _, _ in cells]
        widths = [float(width or 0.0) for _, _, width in cells]
        places = [-(y + place * height) for y in range(len(rows))]
        axes.barh(places, lengths, height, left=start, xerr=widths, label=label)
    axes.set_yticks([-(y + 0.4 - height / 2) for y in range(len(rows))], [row[0] for row in rows], fontsize=7)
    axes.axvline(start, color="black", linewidth=1)
    return _drawn(axes, fontsize=7)


def bandwidth(batches: Sequence[dict[str, Any]], ceiling: float) -> Figure | None:
    """Share of the copy bandwidth that LoRA kernels reach, over the distinct adapters of a batch."""
    if not batches:
        return None
    lines: dict[str, list[tuple[Any, float]]] = {}
    for one in batches:
        share = 100 * one["bytes"] / one["seconds"] / ceiling
        lines.setdefault(one["load"].partition(" of ")[2], []).append((one["distinct"], share))
    axes = _axes("distinct adapters in the batch", "% of the copy bandwidth")
    axes.set_xscale("log", base=2)
    return _drawn(_plotted(axes, {**lines}, "o", coloured=False))


def over_slots(batches: Sequence[dict[str, Any]]) -> Figure | None:
    """Time of the paged kernels over those on slot buffers; None where nothing was compared."""
    peers = {"over csgmv": "slot_buffer_seconds", "over SegmentGEMM": "segment_gemm_seconds"}
    lines: Lines = {
        name: [
            (f"{one['load']}\n{one['rows']} rows, skew {one['skew']:g}", one["seconds"] / one[key])
            for one in batches
            if one[key]
        ]
        for name, key in peers.items()
        if any(one[key] for one in batches)
    }
    if not lines:
        return None
    axes = _axes(y="time of the paged kernels", width=8.0, height=4.2)
    _line(_plotted(axes, lines, "o", coloured=False), 1.0)
    axes.tick_params(axis="x", rotation=90, labelsize=5)
    return _drawn(axes)


def copies(found: Sequence[dict[str, Any]], ceilings: dict[str, float]) -> Figure | None:
    """Bytes a second of row copies by their size, and of plain pinned copies as lines."""
    if not found:
        return None
    axes = _axes("MiB", "GB/s")
    axes.set_xscale("log", base=2)
    for way, ceiling in (("to the device", "to_device_bytes_s"), ("to the host", "to_host_bytes_s")):
        best: dict[float, float] = {}
        for one in (one for one in found if one["way"] == way):
            size = one["bytes"] / 2**20
            best[size] = max(best.get(size, 0.0), one["bytes"] / one["seconds"] / 1e9)
        _plotted(axes, {way: sorted(best.items())}, "-o")
        _line(axes, ceilings[ceiling] / 1e9, color=colour(way), linestyle="--")
    return _drawn(axes)
