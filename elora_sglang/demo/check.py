"""``python -m elora_sglang.demo.check``: does the demo do what tests need of it?

Greedy answers of the base model and of every adapter to the package's fixed prompts, by Transformers: each two of
them must differ on most prompts, and the choices must not be ties.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

PROMPTS = Path(__file__).with_name("prompts.json")
NEW_TOKENS = 20
AIM_DIFFERENT = 0.90  # share of the prompts on which any two of base and adapters answer differently
AIM_MARGIN = 1e-4  # logits; fp32 implementations of one model differ by about 1e-5
AIM_CLEAR = 0.5  # logits; the median choice must be far from a coin toss


def prompts() -> list[str]:
    """The fixed prompts, rendered as the chat template does, ready to be continued."""
    return list(json.loads(PROMPTS.read_text()))


def measure(demo: Path) -> dict[str, Any]:
    """Answer all prompts with base and every adapter; shares of differing answers and margins."""
    from transformers import AutoTokenizer

    from elora_sglang.demo.reference import Job, Reference

    manifest = json.loads((demo / "manifest.json").read_text())
    names: list[str | None] = [None, *(entry["name"] for entry in manifest["adapters"])]
    folders: dict[str, Path | str] = {e["name"]: demo / e["path"] for e in manifest["adapters"]}
    tokenizer = AutoTokenizer.from_pretrained(str(demo / "base"))
    inputs = [tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts()]
    jobs = [Job(ids, name, NEW_TOKENS) for name in names for ids in inputs]
    answers = Reference(demo / "base", folders).answer(jobs)
    by_name = {
        name or "base": answers[i * len(inputs) : (i + 1) * len(inputs)] for i, name in enumerate(names)
    }
    pairs = {
        (a, b): sum(x.output_ids != y.output_ids for x, y in zip(by_name[a], by_name[b], strict=True))
        / len(inputs)
        for a, b in itertools.combinations(by_name, 2)
    }
    rows = []
    for name, mine in by_name.items():
        gaps = sorted(gap for answer in mine for gap in answer.margins)
        others = {pair: share for pair, share in pairs.items() if name in pair}
        closest = min(others, key=lambda pair: others[pair])
        rows.append(
            {
                "name": name,
                "closest": closest[0] if closest[1] == name else closest[1],
                "different": others[closest],
                "smallest_margin": gaps[0],
                "median_margin": gaps[len(gaps) // 2],
                "distinct_answers": len({tuple(answer.output_ids) for answer in mine}),
                "example": tokenizer.decode(mine[0].output_ids),
            }
        )
    return {"prompts": len(inputs), "new_tokens": NEW_TOKENS, "models": rows, "aims": _aims(rows)}


def _aims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    figures = (
        ("answers that differ, closest pair", min(row["different"] for row in rows), AIM_DIFFERENT),
        ("smallest greedy margin (logits)", min(row["smallest_margin"] for row in rows), AIM_MARGIN),
        ("median greedy margin (logits), worst model", min(row["median_margin"] for row in rows), AIM_CLEAR),
    )
    return [{"name": name, "value": value, "aim": aim, "ok": value >= aim} for name, value, aim in figures]


def main(argv: list[str] | None = None) -> int:
    """Print the table or the JSON; 1 with ``--strict`` when an aim is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m elora_sglang.demo.check", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "demo", type=Path, metavar="OUT_DIR", help="folder written by python -m elora_sglang.demo"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--strict", action="store_true", help="exit 1 if an aim is missed")
    args = parser.parse_args(argv)
    if not (args.demo / "manifest.json").exists():
        print(
            f"elora demo: {args.demo} holds no demo: run python -m elora_sglang.demo first", file=sys.stderr
        )
        return 1
    found = measure(args.demo)
    if args.json:
        print(json.dumps(found))
    else:
        print(
            f"{'model':<12} {'closest':<12} {'differ':>7} {'margin min':>11} {'median':>7} {'distinct':>9}  example"
        )
        for row in found["models"]:
            print(
                f"{row['name']:<12} {row['closest']:<12} {row['different']:>7.1%} {row['smallest_margin']:>11.2e} "
                f"{row['median_margin']:>7.2f} {row['distinct_answers']:>6}/{found['prompts']}  {row['example']!r:.60}"
            )
        for aim in found["aims"]:
            print(f"{'ok  ' if aim['ok'] else 'MISS'} {aim['name']}: {aim['value']:.4g} (aim {aim['aim']:g})")
    return 1 if args.strict and not all(aim["ok"] for aim in found["aims"]) else 0


if __name__ == "__main__":
    sys.exit(main())
