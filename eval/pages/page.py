"""One self-contained HTML page from results, and its figures as PNG files."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from elora_sglang.eval import simulate
from elora_sglang.eval.pages import figures
from elora_sglang.eval.serving import report as live


@dataclass(frozen=True)
class Image:
    """A figure: PNG bytes as base64, what it shows, and the name of its file."""

    caption: str
    data: str
    file: str


@dataclass
class Part:
    """A table and figures under one heading."""

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()
    images: list[Image] = field(default_factory=list)

    def draw(self, figure: Figure | None, caption: str, file: str) -> None:
        """Add a figure, if there is one. Mutates this part."""
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            name = re.sub(r"[^a-z0-9]+", "-", file.lower()).strip("-")
            self.images.append(Image(caption, base64.b64encode(buffer.getvalue()).decode(), f"{name}.png"))


@dataclass(frozen=True)
class Section:
    """One run."""

    anchor: str
    title: str
    note: str
    parts: list[Part]
    aims: list[dict[str, Any]]


def section(name: str, data: dict[str, Any]) -> Section:
    """The section of one run's JSON. ``name``: of its file; figures are named after it."""
    simulated = "sizes" in data
    live_chat = "capacities" in data
    if simulated or live_chat:
        parts = list(_simulated(name, data) if simulated else _live(name, data))
    else:
        parts = list(_tables(name, data))
    made = data.get("run", {})
    about = [f"{key}: {value}" for key, value in made.items()]
    if not simulated and not live_chat:
        title = data.get("title", "Tables")
    elif simulated:
        work = data["workload"]
        about.append(f"workload {work['name']}, seed {work['seed']}: {work['parameters']}")
        title = f"{work['name']} on {data['machine']} (simulated)"
    else:
        settings = data["settings"]
        about.append(f"{settings['repeats']} interleaved repeats of {settings['seconds']:g} s a load")
        title = "Live servers side by side"
    return Section(
        re.sub(r"\W+", "-", name), f"{name}: {title}", "\n".join(about), parts, data.get("aims", [])
    )


def _tables(name: str, data: dict[str, Any]) -> Iterator[Part]:
    found = data.get("reproduction", {})
    for number, one in enumerate(data["tables"]):
        part = Part(one["title"], one["header"], one["rows"])
        label = f"{name} {number}"
        if one["title"].startswith("The grid:"):
            part.draw(figures.peaks(found["grid"]), "Peak load over the first system's", label)
        if one["title"].startswith("The grid's centre"):
            part.draw(
                figures.curve(found["centre"][0]["curve"]), "Mean TTFT over rate; the limit as a line", label
            )
        if one["title"].startswith("What each part is worth"):
            part.draw(figures.ratio_bars(one["header"], one["rows"]), "Mean TTFT without a part", label)
        if one["title"].startswith("Mooncake"):
            part.draw(
                figures.share_bars(one["header"], one["rows"], one["header"][0]),
                "Share of the gap closed",
                label,
            )
        if one["title"].startswith("LoRA kernels"):
            part.draw(
                figures.bandwidth(data["lora"], data["ceilings"]["copy_bytes_s"]),
                "Bytes that a layer's LoRA must move, over its time, as a share of a large copy's; one mark a batch",
                f"{label} lora",
            )
            part.draw(figures.over_slots(data["lora"]), "Time over kernels on slot buffers", f"{label} peers")
        if one["title"].startswith("Copies of scattered"):
            part.draw(
                figures.copies(data["copies"], data["ceilings"]), "Row copies beside plain pinned ones", label
            )
        if "TTFT over rate" in one["title"]:
            part.draw(figures.ttft_over_rate(data["cells"]), "Mean TTFT over rate; bars: repeats", label)
        yield part


def _simulated(name: str, data: dict[str, Any]) -> Iterator[Part]:
    for size in data["sizes"]:
        systems, label = size["systems"], f"{name} {size['memory']}"
        part = Part(
            f"{size['memory']} ({size['device_slots']:,} device slots)",
            simulate.HEADER,
            simulate.rows(systems, size["bound_s"]),
        )
        part.draw(figures.ttft_bars(systems), "Mean TTFT, P99 as a mark", f"{label} ttft")
        part.draw(
            figures.restore_bars(systems, size["bound_s"]),
            "Cost of what memory could not hold",
            f"{label} restore",
        )
        part.draw(figures.ttft_cdf(systems), "TTFT of all requests", f"{label} cdf")
        for system, values in systems.items():
            if "series" in values and system in ("stock", "hicache", "lru", "elora"):
                part.draw(
                    figures.memory(values["series"]),
                    f"{system}: what the device holds",
                    f"{label} {system} memory",
                )
                part.draw(
                    figures.residency(values["series"]),
                    f"{system}: adapters on the device over time", f"{label} {system} adapters",
                )  # fmt: skip
        yield part


def _live(name: str, data: dict[str, Any]) -> Iterator[Part]:
    yield Part("All cells", live.HEADER, live.rows(data))
    for factor in dict.fromkeys(cell["factor"] for cell in data["cells"]):
        cells = [cell for cell in data["cells"] if cell["factor"] == factor]
        part = Part(f"Working set {factor:g} times the device memory")
        part.draw(
            figures.ttft_over_rate(cells), "Mean TTFT over rate; bars: repeats", f"{name} {factor:g}x rate"
        )
        yield part
    if data.get("ablations"):
        part = Part("What each part is worth")
        part.draw(
            figures.ablations(data["ablations"]),
            "Mean TTFT without a part, over that of the whole",
            f"{name} ablations",
        )
        yield part


def write(folder: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write ``index.html`` and all figures into ``folder``, which is made; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    template = Path(__file__).with_name("report.jinja").read_text(encoding="utf-8")
    text = jinja2.Environment(autoescape=True).from_string(template).render(title=title, sections=sections)
    page = folder / "index.html"
    page.write_text(text, encoding="utf-8")
    for one in sections:
        for part in one.parts:
            for image in part.images:
                (folder / image.file).write_bytes(base64.b64decode(image.data))
    return page
