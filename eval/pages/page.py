"""One self-contained HTML page from results, and its figures as PNG files.

What is drawn beside a table depends on the table's name (:data:`DRAWN`).
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from elora_sglang.eval import simulate
from elora_sglang.eval.pages import figures
from elora_sglang.eval.reproduction import reasons
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


#: Figure, caption, and what its file's name ends with.
Drawn = tuple[Figure | None, str, str]
_LORA = "Bytes that a layer's LoRA must move, over its time, as a share of a large copy's; one mark a batch"
#: What is drawn beside a table, by the table's name, from the whole result, the header and the rows.
DRAWN: dict[str, Callable[[dict[str, Any], Any, Any], list[Drawn]]] = {
    "grid": lambda data, *_: [
        (figures.peaks(data["reproduction"]["grid"]), "Peak load over the first system's", "")
    ],
    "centre": lambda data, *_: [
        (figures.curve(data["reproduction"]["centre"][0]["curve"]), "Mean TTFT over rate; the limit as a line", "")
    ],
    "ablations": lambda _, head, rows: [(figures.table_bars(head, rows, 1.0), "Mean TTFT without a part", "")],
    "gap": lambda _, head, rows: [(figures.table_bars(head, rows, 0.0), "Share of the gap closed", "")],
    "lora-kernels": lambda data, *_: [
        (figures.bandwidth(data["lora"], data["ceilings"]["copy_bytes_s"]), _LORA, " lora"),
        (figures.over_slots(data["lora"]), "Time over kernels on slot buffers", " peers"),
    ],
    "row-copies": lambda data, *_: [
        (figures.copies(data["copies"], data["ceilings"]), "Row copies beside plain pinned ones", "")
    ],
    "ttft-over-rate": lambda data, *_: [
        (figures.ttft_over_rate(data["cells"]), "Mean TTFT over rate; bars: repeats", "")
    ],
}  # fmt: skip
#: Names of tables in results from before tables had names, by what their titles begin with or hold.
OLD_TITLES = {
    "The paper's claims": "claims", "The grid:": "grid", "The grid's centre": "centre",
    "What each part is worth": "ablations", "Mooncake": "gap", "LoRA kernels": "lora-kernels",
    "Copies of scattered": "row-copies", ": TTFT over rate": "ttft-over-rate",
}  # fmt: skip


def name_of(table: dict[str, Any]) -> str:
    """The name of a result's table, also of an old result."""
    old = (name for title, name in OLD_TITLES.items() if title in table["title"])
    return str(table["name"]) if "name" in table else next(old, "")


def section(path: Path, data: dict[str, Any]) -> Section:
    """The section of one run's JSON. Figures are named after its file; reasons of claims lie beside it."""
    name = path.stem
    about = [f"{key}: {value}" for key, value in data.get("run", {}).items()]
    if "sizes" in data:
        parts, work = _simulated(name, data), data["workload"]
        about.append(f"workload {work['name']}, seed {work['seed']}: {work['parameters']}")
        title = f"{work['name']} on {data['machine']} (simulated)"
    elif "capacities" in data:
        parts, settings = _live(name, data), data["settings"]
        about.append(f"{settings['repeats']} interleaved repeats of {settings['seconds']:g} s a load")
        title = "Live servers side by side"
    else:
        parts, title = _tables(path, data), data.get("title", "Tables")
    anchor, heading = re.sub(r"\W+", "-", name), f"{name}: {title}"
    return Section(anchor, heading, "\n".join(about), list(parts), data.get("aims", []))


def _tables(path: Path, data: dict[str, Any]) -> Iterator[Part]:
    for number, table in enumerate(data["tables"]):
        name, header, rows = name_of(table), table["header"], table["rows"]
        if name == "claims":
            rows = reasons.explained(rows, reasons.read(path))
        part = Part(table["title"], header, rows)
        for figure, caption, ending in DRAWN[name](data, header, rows) if name in DRAWN else ():
            part.draw(figure, caption, f"{path.stem} {number}{ending}")
        yield part


def _simulated(name: str, data: dict[str, Any]) -> Iterator[Part]:
    for size in data["sizes"]:
        systems, bound, label = size["systems"], size["bound_s"], f"{name} {size['memory']}"
        title = f"{size['memory']} ({size['device_slots']:,} device slots)"
        part = Part(title, simulate.HEADER, simulate.rows(systems, bound))
        part.draw(figures.ttft_bars(systems), "Mean TTFT, P99 as a mark", f"{label} ttft")
        part.draw(
            figures.restore_bars(systems, bound), "Cost of what memory could not hold", f"{label} restore"
        )
        part.draw(figures.ttft_cdf(systems), "TTFT of all requests", f"{label} cdf")
        for system in ("stock", "hicache", "lru", "elora"):
            if series := systems.get(system, {}).get("series"):
                over_time, place = f"{system}: adapters on the device over time", f"{label} {system}"
                part.draw(figures.memory(series), f"{system}: what the device holds", f"{place} memory")
                part.draw(figures.residency(series), over_time, f"{place} adapters")
        yield part


def _live(name: str, data: dict[str, Any]) -> Iterator[Part]:
    yield Part("All cells", live.HEADER, live.rows(data))
    for factor in dict.fromkeys(cell["factor"] for cell in data["cells"]):
        cells = [cell for cell in data["cells"] if cell["factor"] == factor]
        part = Part(f"Working set {factor:g} times the device memory")
        drawn = figures.ttft_over_rate(cells)
        part.draw(drawn, "Mean TTFT over rate; bars: repeats", f"{name} {factor:g}x rate")
        yield part
    if data.get("ablations"):
        part = Part("What each part is worth")
        caption = "Mean TTFT without a part, over that of the whole"
        part.draw(figures.ablations(data["ablations"]), caption, f"{name} ablations")
        yield part


def write(folder: Path, title: str, sections: Sequence[Section]) -> Path:
    """Write ``index.html`` and all figures into ``folder``, which is made; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    template = Path(__file__).with_name("report.jinja").read_text(encoding="utf-8")
    text = jinja2.Environment(autoescape=True).from_string(template).render(title=title, sections=sections)
    page = folder / "index.html"
    page.write_text(text, encoding="utf-8")
    for image in (image for one in sections for part in one.parts for image in part.images):
        (folder / image.file).write_bytes(base64.b64decode(image.data))
    return page
