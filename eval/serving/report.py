"""The table, the aims and the JSON of a live comparison."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from elora_sglang.core.policies.base import LORA_SHARE
from elora_sglang.eval.serving.launch import STOCK
from elora_sglang.eval.support import estimates
from elora_sglang.eval.support.reporting import Aim

HEADER = (
    "working set, load, system", "TTFT ms", "95 % interval", "p50", "p95", "p99", "TPOT ms", "KV dev %", "KV host %",
    "adapter dev %", "invalid %", "moved GB", "turns/s", "÷ baseline", "95 % interval",
)  # fmt: skip
#: Mean TTFT of elora over that of the best stock, and of tuned HiCache; what ``static`` wastes at least.
AIM_TTFT = {"stock": (0.45, "the best stock"), "hicache": (0.70, "tuned HiCache")}
AIM_STATIC_INVALID = 0.20
#: The last is what servers before 0.2 called it.
ADAPTER_LOADS = ("adapter_loads", "elora.done.adapter_loads", "elora.adapter_loads")
MOVED = ("moved_load", "moved_save", "elora.loaded_bytes", "elora.saved_bytes")

Cells = list[dict[str, Any]]
#: Working set, whose capacity the load is a share of, and the share.
Place = tuple[float, str, float]


def title(data: dict[str, Any]) -> str:
    """What was measured, with the link, in a few lines."""
    budget, ratio, settings = data["budget"], data["profile"], data["settings"]
    link = f"{data['link_gbps']:.3f} GB/s each way" if data["link_gbps"] else "off"
    capacities = {name: round(value, 2) for name, value in data["capacities"].items()}
    shares = [
        f"{100 * e['invalid_kv']:.0f} % at {e['setting']:g} ({e['factor']:g}x)"
        for e in data["tuning"]
        if "invalid_kv" in e
    ]
    wasted = f" (invalid KV of static meanwhile: {', '.join(shares)})" if shares else ""
    return (
        f"chat, {settings['repeats']} interleaved repeats of {settings['seconds']:g} s a load, after a warm-up: device "
        f"{budget['device_tokens']} and host {budget['host_tokens']} KV tokens for each, "
        f"{budget['adapters']} adapters\n"
        f"emulated link {link}, prefill {1e6 * data['prefill_s_per_token']:.0f} µs a token; "
        f"proportions of: {ratio['name']} ({ratio['sources']['default']})\n"
        f"tuned: {data['chosen']}{wasted}; capacity, turns/s: {capacities}"
    )


def _groups(cells: Cells) -> dict[Place, dict[str, Cells]]:
    found: dict[Place, dict[str, Cells]] = {}
    for cell in sorted(cells, key=lambda cell: int(cell["repeat"])):
        place = cell["factor"], cell["of"], cell["load"]
        found.setdefault(place, {}).setdefault(cell["name"], []).append(cell)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1] != "stock", item[0][2])))


def _where(place: Place) -> str:
    factor, of, share = place
    return f"{factor:g}x, {share:g} of {of}"


def _repeats(cells: Cells, key: str = "ttft_mean") -> list[float]:
    return [float(cell["summary"][key]) for cell in cells]


def reference(group: dict[str, Cells], of: str) -> str:
    """What the others are compared with: the better stock by mean TTFT, or the system that the load is a share of."""
    there = [name for name in ("stock", "stock-overlap") if name in group] if of == "stock" else [of]
    return min(there, key=lambda name: statistics.fmean(_repeats(group[name])))


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


def _invalid(cells: Cells) -> float | None:
    shares = [cell["summary"]["invalid_kv"] for cell in cells if "invalid_kv" in cell["summary"]]
    return statistics.fmean(shares) if shares else None


def _row(label: str, cells: Cells, reference: Cells) -> list[str]:
    mean, low, high = estimates.interval(_repeats(cells))

    def told(value: float | None, scale: float, digits: int) -> str:
        return "-" if value is None else f"{scale * value:.{digits}f}"

    def means(scale: float, digits: int, *keys: str) -> list[str]:
        return [f"{scale * statistics.fmean(_repeats(cells, key)):.{digits}f}" for key in keys]

    versus = ["", ""]
    if reference is not cells:
        ratio = estimates.paired_ratio(_repeats(cells), _repeats(reference))
        versus = [f"{ratio.mean:.2f}", f"{ratio.low:.2f} to {ratio.high:.2f}"]
    return [
        label,
        f"{1000 * mean:.0f}",
        f"{1000 * max(0.0, low):.0f} to {1000 * high:.0f}",
        *means(1000, 0, "ttft_p50", "ttft_p95", "ttft_p99"),
        *means(1000, 1, "tpot_mean"),
        *means(100, 0, "hit_device", "hit_host"),
        told(adapter_hits(cells), 100, 0),
        told(_invalid(cells), 100, 1),
        told(moved_bytes(cells), 1e-9, 2),
        *means(1, 2, "rate"),
        *versus,
    ]


def rows(data: dict[str, Any]) -> list[list[str]]:
    """One row per working set, load and system; then the ablations, each against the elora beside it."""
    found = []
    for place, group in _groups(data["cells"]).items():
        against = group[reference(group, place[1])]
        found += [_row(f"{_where(place)}: {name}", cells, against) for name, cells in group.items()]
    for place, group in _groups(data["ablations"]).items():
        plain: Cells = []
        for name, cells in group.items():
            plain = cells if name.startswith("elora#") else plain
            found.append(_row(f"{_where(place)}: {name} (÷ elora)", cells, plain))
    return found


def differing(
    ours: Mapping[str, Sequence[int]], theirs: Mapping[str, Sequence[int]]
) -> tuple[int, list[str]]:
    """(answers compared, keys of those that differ) among requests that both answered; keys: session/turn.

    Once an answer differs, the later prompts of its session do, too: only the first of a session is counted and
    what follows is not compared.
    """
    broken: set[str] = set()
    compared, found = 0, []
    for session, turn in sorted((key.rpartition("/")[0], int(key.rpartition("/")[2])) for key in ours):
        key = f"{session}/{turn}"
        if key not in theirs or session in broken:
            continue
        compared += 1
        if tuple(ours[key]) != tuple(theirs[key]):
            broken.add(session)
            found.append(key)
    return compared, found


def answers(data: dict[str, Any]) -> dict[str, Any]:
    """Answers that differ from those of the system that the load is a share of: how many of how many, examples."""
    compared = 0
    different: list[str] = []
    for (_, of, _), group in _groups(data["cells"]).items():
        known = {cell["repeat"]: cell["answers"] for cell in group[of]}
        for name, cells in group.items():
            for cell in cells if name != of else []:
                seen, keys = differing(cell["answers"], known[cell["repeat"]])
                compared += seen
                different += [f"{name} {key}" for key in keys]
    return {"different": len(different), "compared": compared, "examples": different[:10]}


def aims(data: dict[str, Any]) -> list[Aim]:
    """The aims, for every working set and load; those of systems that were not compared are left out."""
    found = []
    for place, group in _groups(data["cells"]).items():
        where = _where(place)
        if "elora" in group:
            limit, name = AIM_TTFT[place[1]]
            against = group[reference(group, place[1])]
            value = estimates.paired_ratio(_repeats(group["elora"]), _repeats(against)).mean
            found.append(Aim.at_most(f"{where}: mean TTFT of elora over {name}", value, limit))
        for name, cells in group.items():
            # The best share of static may hold all adapters, so that nothing is invalid.
            if name not in (*STOCK, "static") and (wasted := _invalid(cells)) is not None:
                found.append(Aim(f"{where}: invalid KV of {name}", wasted, 0, wasted == 0))
    for entry in data["tuning"]:
        if entry["system"] == "static" and entry["setting"] == LORA_SHARE and "invalid_kv" in entry:
            where = f"{entry['factor']:g}x, tuning: invalid KV of static at its default share {LORA_SHARE:g}"
            found.append(Aim.at_least(where, entry["invalid_kv"], AIM_STATIC_INVALID))
    if (told := answers(data))["compared"]:
        wrong = told["different"]
        found.append(
            Aim(f"answers that differ from the baseline's, of {told['compared']}", wrong, 0, wrong == 0)
        )
    return found


def without_answers(cells: Cells) -> Cells:
    """The cells without single answers, which stay in the cells' files."""
    return [{k: v for k, v in cell.items() if k not in ("answers", "ttft")} for cell in cells]
