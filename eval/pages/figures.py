"""Pictures of results. Each function returns a matplotlib figure, or None where the data has nothing to draw."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: One colour a system, the same in all figures; others take grey.
COLOURS = {
    "stock": "#8c8c8c", "stock-overlap": "#bdbdbd", "hicache": "#4c78a8", "vllm": "#72b7b2", "vllm-offload": "#3a8f8a",
    "s-lora": "#b279a2", "static": "#e7ba52", "lru": "#d67195", "lfu": "#c49c94", "paper": "#54a24b",
    "elora": "#e45756", "clairvoyant": "#222222",
}  # fmt: skip
USES = {"adapters": "#e45756", "kv": "#4c78a8", "running": "#72b7b2", "free": "#eeeeee"}


def colour(name: str) -> str:
    """Of a system."""
    return COLOURS.get(name, "#999999")


def _axes(x: str = "", y: str = "", *, width: float = 7.0, height: float = 3.6, **more: Any) -> Axes:
    """Axes of a new figure, with their labels; ``more``: for ``Axes.set``."""
    axes = Figure(figsize=(width, height), dpi=120, layout="constrained").subplots()
    axes.set(xlabel=x, ylabel=y, **more)
    return axes


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


def ttft_bars(systems: dict[str, Any]) -> Figure:
    """Mean TTFT with P99 as a mark, by system; a logarithmic axis."""
    axes = _axes(y="TTFT, ms", yscale="log")
    names = list(systems)
    means, tails = ([1000 * systems[name]["ttft"][key] for name in names] for key in ("mean", "p99"))
    axes.bar(names, means, color=[colour(name) for name in names])
    axes.plot(names, tails, "k_", markersize=14, label="P99")
    axes.tick_params(axis="x", rotation=30)
    return _drawn(axes, fontsize=10)


def restore_bars(systems: dict[str, Any], bound: float | None) -> Figure:
    """Seconds to restore by system, with the lower bound as a line."""
    axes = _axes(y="seconds to restore")
    axes.bar(
        list(systems),
        [one["restore_s"] for one in systems.values()],
        color=[colour(name) for name in systems],
    )
    if bound is not None:
        axes.axhline(bound, color="black", linestyle="--", linewidth=1, label="no policy is below")
    axes.tick_params(axis="x", rotation=30)
    return _drawn(axes, legend=bound is not None, fontsize=10)


def ttft_cdf(systems: dict[str, Any]) -> Figure | None:
    """Share of requests whose first token came within so many seconds."""
    drawn = {name: one["series"]["ttft_percentiles"] for name, one in systems.items() if "series" in one}
    if not drawn:
        return None
    axes = _axes("TTFT, ms", "% of requests", xscale="log")
    for name, percentiles in drawn.items():
        axes.plot([max(1000 * s, 0.1) for s in percentiles], range(101), color=colour(name), label=name)
    return _drawn(axes)


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
    axes = _axes("turns a second", "mean TTFT, ms", yscale="log")
    for name in dict.fromkeys(point["system"] for point in points):
        mine = sorted((p["rate"], 1000 * p["ttft"]["mean"]) for p in points if p["system"] == name)
        axes.plot(*zip(*mine, strict=True), color=colour(name), label=name, marker="o", markersize=3)
    axes.axhline(500, color="black", linestyle="--", linewidth=1)
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


def share_bars(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Figure | None:
    """A table of "value ± width" cells (or "value") as grouped bars, one group a row."""

    def read(cell: str) -> tuple[float, float]:
        value, _, width = cell.partition(" ± ")
        return float(value), float(width or 0.0)

    return _grouped_bars(header, rows, read, start=0.0)


def ratio_bars(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Figure | None:
    """A table of ratios as grouped bars around 1, one group a row; an empty cell is 1."""
    return _grouped_bars(header, rows, lambda cell: (float(cell or 1.0), 0.0), start=1.0)


def _grouped_bars(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    read: Callable[[str], tuple[float, float]],
    *,
    start: float,
) -> Figure | None:
    """Bars that begin at ``start``. ``read``: value of a cell, and half the width of its interval."""
    if not rows:
        return None
    axes = _axes(header[0], width=8.0, height=1.0 + 0.32 * len(rows))
    height = 0.8 / (len(header) - 1)
    for place, label in enumerate(header[1:]):
        values, widths = zip(*(read(row[place + 1]) for row in rows), strict=True)
        places = [-(y + place * height) for y in range(len(rows))]
        lengths = [value - start for value in values]
        axes.barh(places, lengths, height, left=start, xerr=widths, label=label)
    axes.set_yticks([-(y + 0.4 - height / 2) for y in range(len(rows))], [row[0] for row in rows], fontsize=7)
    axes.axvline(start, color="black", linewidth=1)
    return _drawn(axes, fontsize=7)


def bandwidth(batches: Sequence[dict[str, Any]], ceiling: float) -> Figure | None:
    """Share of the copy bandwidth that LoRA kernels reach, over the distinct adapters of a batch."""
    if not batches:
        return None
    axes = _axes("distinct adapters in the batch", "% of the copy bandwidth")
    for kind in dict.fromkeys(one["load"].partition(" of ")[2] for one in batches):
        mine = [one for one in batches if one["load"].partition(" of ")[2] == kind]
        shares = [100 * one["bytes"] / one["seconds"] / ceiling for one in mine]
        axes.plot([one["distinct"] for one in mine], shares, "o", markersize=3, label=kind)
    axes.set_xscale("log", base=2)
    return _drawn(axes)


def over_slots(batches: Sequence[dict[str, Any]]) -> Figure | None:
    """Time of the paged kernels over those on slot buffers; None where nothing was compared."""
    peers = {"csgmv": "slot_buffer_seconds", "SegmentGEMM": "segment_gemm_seconds"}
    drawn = {name: key for name, key in peers.items() if any(one[key] for one in batches)}
    if not drawn:
        return None
    axes = _axes(y="time of the paged kernels", width=8.0, height=4.2)
    for name, key in drawn.items():
        mine = [one for one in batches if one[key]]
        labels = [f"{one['load']}\n{one['rows']} rows, skew {one['skew']:g}" for one in mine]
        times = [one["seconds"] / one[key] for one in mine]
        axes.plot(labels, times, "o", markersize=3, label=f"over {name}")
    axes.axhline(1.0, color="black", linewidth=1)
    axes.tick_params(axis="x", rotation=90, labelsize=5)
    return _drawn(axes)


def copies(found: Sequence[dict[str, Any]], ceilings: dict[str, float]) -> Figure | None:
    """Bytes a second of row copies by their size, and of plain pinned copies as lines."""
    if not found:
        return None
    axes = _axes("MiB", "GB/s")
    for way, ceiling, shade in (
        ("to the device", "to_device_bytes_s", "#e45756"), ("to the host", "to_host_bytes_s", "#4c78a8"),
    ):  # fmt: skip
        best: dict[float, float] = {}
        for one in (one for one in found if one["way"] == way):
            size = one["bytes"] / 2**20
            best[size] = max(best.get(size, 0.0), one["bytes"] / one["seconds"] / 1e9)
        axes.plot(*zip(*sorted(best.items()), strict=True), color=shade, marker="o", markersize=3, label=way)
        axes.axhline(ceilings[ceiling] / 1e9, color=shade, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    return _drawn(axes)
