"""The pages stay readable: short sentences, short table cells, a first line that says what the page is for."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.doc_pages import PAGES, ROOT, blocks, cells, measure, sentences, words

MEDIAN, LONG, LONG_SHARE, LONGEST = 16, 30, 0.05, 35
CELL = 40

#: Sentences that may be longer than ``LONGEST``: the beginning of the sentence, and why.
EXCEPTIONS: dict[str, str] = {}

#: Its tables are made of the help texts of flags, which argparse prints as well.
LONG_CELLS = {ROOT / "docs" / "flags.md"}

#: Pages made from tables or lists of words, whose first paragraph says something else.
GUIDES = [page for page in PAGES if page.parent.name == "docs" and page.stem not in ("flags", "glossary")]


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_sentences_are_short(page: Path) -> None:
    text = page.read_text()
    found = measure(text)
    too_long = [
        sentence
        for sentence in sentences(text)
        if words(sentence) > LONGEST and not any(sentence.startswith(start) for start in EXCEPTIONS)
    ]
    assert not too_long
    assert found.median <= MEDIAN
    long = [sentence for sentence in sentences(text) if words(sentence) > LONG]
    assert found.above_30 <= LONG_SHARE * found.count, long


@pytest.mark.parametrize("page", [page for page in PAGES if page not in LONG_CELLS], ids=ids)
def test_a_table_is_no_hiding_place_for_prose(page: Path) -> None:
    assert not [cell for cell in cells(page.read_text()) if words(cell) > CELL]


@pytest.mark.parametrize("page", GUIDES, ids=ids)
def test_a_guide_begins_with_what_its_reader_can_do_then(page: Path) -> None:
    assert blocks(page.read_text())[0].startswith("After this page you can ")


def test_exceptions_are_still_needed() -> None:
    everything = [sentence for page in PAGES for sentence in sentences(page.read_text())]
    for start, reason in EXCEPTIONS.items():
        assert reason
        assert any(s.startswith(start) and words(s) > LONGEST for s in everything), start


def test_the_measure_finds_what_it_is_for() -> None:
    long = "A " + "very " * 36 + "long sentence."
    text = f"# A heading\n\nShort one here. {long}\n\n- an item of a list\n\n| a | {long} |\n\n```\n{long}\n```\n"
    assert [words(s) for s in sentences(text)] == [3, 39, 5]
    assert max(words(cell) for cell in cells(text)) == 39
    assert [words(s) for s in sentences("See `a b. C` and [two words](x.md), e.g. This one.")] == [8]
