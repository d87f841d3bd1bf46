"""The pages for people, taken apart: sentences, table cells, links, headings, code spans and command lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]

#: ``docs/flags.md`` is generated from the code; it is a page like the others.
PAGES = [
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]

#: A label such as "Apache-2.0." is no sentence; counting it would only lower the median.
LEAST_WORDS = 3

_FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")
_SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.)\s+")
#: Not an end: "e.g. ", "i.e. ", "vs. ", "Eq. 3".
_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bEq)[.!?][)\"*_]*\s+(?=[\"'(*_]*[A-Z0-9`/.-])")


def without_code(text: str) -> str:
    """The page without fenced code and comments."""
    return _COMMENT.sub("", _FENCE.sub("", text))


def blocks(text: str) -> list[str]:
    """Paragraphs and list items, in order: no headings, tables, code or indented lines after an empty one."""
    found: list[str] = []
    open_block = False
    for line in without_code(text).splitlines():
        stripped = line.strip()
        indented_code = line.startswith("    ") and not open_block
        if not stripped or stripped.startswith(("#", "|")) or indented_code:
            open_block = False
            continue
        if _ITEM.match(line) or not open_block:
            found.append(_ITEM.sub("", stripped))
            open_block = True
        else:
            found[-1] += " " + stripped
    return found


def plain(text: str) -> str:
    """Text as it is read aloud: a link is its words, a code span is one word."""
    return _SPAN.sub("`code`", _LINK.sub(r"\1", text))


def words(text: str) -> int:
    """Words with a letter or a digit in them."""
    return sum(any(c.isalnum() for c in word) for word in plain(text).split())


def sentences(text: str) -> list[str]:
    """Sentences of a page's prose, in order."""
    found = []
    for block in blocks(text):
        start, spoken = 0, plain(block)
        for end in _END.finditer(spoken):
            found.append(spoken[start : end.end()].strip())
            start = end.end()
        found.append(spoken[start:].strip())
    return [sentence for sentence in found if words(sentence) >= LEAST_WORDS]


@dataclass(frozen=True)
class Measure:
    """How long a page's sentences are, in words."""

    count: int
    median: float
    above_30: int
    longest: int


def measure(text: str) -> Measure:
    """The measure of one page."""
    lengths = [words(sentence) for sentence in sentences(text)] or [0]
    return Measure(len(lengths), median(lengths), sum(n > 30 for n in lengths), max(lengths))


def cells(text: str) -> list[str]:
    """Cells of all tables, head and body."""
    found = []
    for line in without_code(text).splitlines():
        if line.strip().startswith("|") and not set(line.strip()) <= set("|-: "):
            found += [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
    return found


def links(text: str) -> list[str]:
    """Targets of all links that point into this repository."""
    targets = [match.group(2) for match in _LINK.finditer(without_code(text))]
    return [target for target in targets if "://" not in target]


def anchors(text: str) -> set[str]:
    """Names of the page's headings, as GitHub makes them; a name that comes again gets a number."""
    names: dict[str, int] = {}
    found = set()
    for line in without_code(text).splitlines():
        if re.match(r"#{1,6} ", line):
            heading = _LINK.sub(r"\1", line.lstrip("#").strip()).replace("`", "").lower()
            name = re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")
            seen = names.get(name, 0)
            names[name] = seen + 1
            found.add(f"{name}-{seen}" if seen else name)
    return found


def code_spans(text: str) -> list[str]:
    """Text between backticks, outside fenced code."""
    return [match.group(2) for match in _SPAN.finditer(without_code(text))]


def command_lines(text: str) -> list[str]:
    """Commands that a page shows: lines of fenced code, continued ones joined, and code spans with a blank."""
    fenced = "\n".join(match.group(0) for match in _FENCE.finditer(text)).replace("\\\n", " ")
    return [*fenced.splitlines(), *(" ".join(span.split()) for span in code_spans(text) if " " in span)]


def main() -> None:
    """One line per page: sentences, median, how many are above 30 words, the longest."""
    for page in PAGES:
        m = measure(page.read_text())
        name = page.relative_to(ROOT)
        print(
            f"{name!s:28} {m.count:4} sentences, median {m.median:4.1f}, above 30: {m.above_30}, {m.longest}"
        )


if __name__ == "__main__":
    main()
