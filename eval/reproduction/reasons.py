"""Why our figures are not the paper's: data beside the result that they explain, ``RESULT.reasons.json``.

A reason belongs to a claim and to the figure that it explains. Where another run gives another figure it is not shown.
``python -m elora_sglang.eval.reproduction.reasons NEW.json OLD.json`` writes NEW's file with OLD's reasons, bound to
the new figures, and prints each claim whose figure moved: read whether its reason still holds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elora_sglang.eval.reproduction import claims

#: The result whose reasons a run that is not yet a file may borrow, where the figures are the same.
LATEST = Path(__file__).resolve().parents[1] / "results" / "part5-reproduce.json"

#: By claim: ``{"figure": what it explains, "why": ...}``.
Reasons = dict[str, dict[str, str]]


def beside(result: Path) -> Path:
    """The file of a result's reasons."""
    return result.with_suffix(".reasons.json")


def read(result: Path) -> Reasons:
    """The reasons beside a result; none where it has no such file."""
    path = beside(result)
    return dict(json.loads(path.read_text(encoding="utf-8"))["reasons"]) if path.exists() else {}


def explained(rows: Sequence[Sequence[Any]], found: Reasons) -> list[list[Any]]:
    """Rows of the table of claims with the reasons of their figures; a reason that a row brings itself stays."""

    def why(what: str, figure: str, own: str) -> str:
        reason = found.get(claims.claim_id(what))
        return own or (reason["why"] if reason is not None and reason["figure"] == figure else "")

    return [[what, paper, figure, why(what, figure, own)] for what, paper, figure, own in rows]


def faults(rows: Sequence[Sequence[Any]], found: Reasons) -> list[str]:
    """Reasons for figures that are not there, and figures without a reason, a line each."""
    figures = {claims.claim_id(row[0]): row[2] for row in rows}
    wrong = [f"{claim}: there is no such claim" for claim in found if claim not in figures]
    wrong += [f"{claim}: no reason" for claim in figures if not found.get(claim, {}).get("why")]
    return wrong + [
        f"{claim}: the reason is for {one['figure']}, the result has {figures[claim]}"
        for claim, one in found.items()
        if one["figure"] != figures.get(claim, one["figure"])
    ]


def carry(new: Path, old: Path) -> list[str]:
    """Write ``new``'s reasons from ``old``'s, bound to ``new``'s figures; returns what to check, a line each."""
    known = read(old)
    rows = claims.rows(json.loads(new.read_text(encoding="utf-8"))["reproduction"])
    moved = faults(rows, known)
    bound = {}
    for what, _, figure, _ in rows:
        if reason := known.get(claims.claim_id(what)):
            bound[claims.claim_id(what)] = {"figure": figure, "why": reason["why"]}
    text = json.dumps({"result": new.name, "reasons": bound}, indent=1, ensure_ascii=False)
    beside(new).write_text(text + "\n", encoding="utf-8")
    return moved


if __name__ == "__main__":
    print(*carry(Path(sys.argv[1]), Path(sys.argv[2])), sep="\n")
