"""Greedy answers by Transformers with merged adapters, JSON file in, JSON file out. Never imports SGLang.

    python tests/oracle/generate.py JOBS.json ANSWERS.json [--cache FOLDER]

JOBS.json:    {"model": PATH, "adapters": {NAME: PATH}, "jobs": [{"input_ids": [..], "adapter": NAME or null,
              "max_new_tokens": N, "stop_ids": [..] (optional)}]}
ANSWERS.json: [{"output_ids": [..], "margins": [..]}], in the order of the jobs. A margin is the logit gap between
              the chosen id and the runner-up: a token that differs at a margin near zero is a tie, not a fault.

With ``--cache`` answers are kept by content (weights, adapter and job), so that an unchanged job costs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from elora_sglang.demo.reference import Answer, Job, Reference


def folder_digest(folder: Path) -> str:
    """Digest of what decides a model's or an adapter's answers: its configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json")]):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def answers(request: dict[str, Any], cache: Path | None) -> list[dict[str, Any]]:
    """Answer all jobs of a request, from ``cache`` where it has them; new answers are added to it."""
    jobs = [
        Job(tuple(j["input_ids"]), j["adapter"], j["max_new_tokens"], tuple(j.get("stop_ids", ())))
        for j in request["jobs"]
    ]
    keys = _keys(request, jobs)
    stored = cache / f"{folder_digest(Path(request['model']))[:16]}.json" if cache else None
    known: dict[str, dict[str, Any]] = json.loads(stored.read_text()) if stored and stored.exists() else {}
    missing = [i for i, key in enumerate(keys) if key not in known]
    if missing:
        reference = Reference(request["model"], request["adapters"])
        for i, answer in zip(missing, reference.answer([jobs[i] for i in missing]), strict=True):
            known[keys[i]] = _plain(answer)
        if stored:
            stored.parent.mkdir(parents=True, exist_ok=True)
            fresh = stored.with_suffix(".partial")
            fresh.write_text(json.dumps(known))
            fresh.replace(stored)
    return [known[key] for key in keys]


def _plain(answer: Answer) -> dict[str, Any]:
    return {"output_ids": answer.output_ids, "margins": answer.margins}


def _keys(request: dict[str, Any], jobs: list[Job]) -> list[str]:
    adapters = {name: folder_digest(Path(path)) for name, path in request["adapters"].items()}
    return [
        hashlib.sha256(
            repr(
                (
                    job.input_ids,
                    adapters[job.adapter] if job.adapter else "",
                    job.max_new_tokens,
                    job.stop_ids,
                )
            ).encode()
        ).hexdigest()
        for job in jobs
    ]


def main() -> int:
    """Read the jobs, write the answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("jobs", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--cache", type=Path, default=None, help="folder in which answers are kept")
    args = parser.parse_args()
    found = answers(json.loads(args.jobs.read_text()), args.cache)
    assert "sglang" not in sys.modules, "the oracle must not import sglang"
    args.answers.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
