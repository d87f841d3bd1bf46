"""Golden answers in a process of their own: ``generate.py DEMO_DIR JOBS.json OUT.json``.

``JOBS.json``: list of ``{"adapter": name or null, "input_ids": [...], "max_new_tokens": n, "stop_ids": [...]}``.
``OUT.json``: list of ``{"output_ids": [...], "margins": [...]}`` in the same order. Never imports SGLang.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from elora_sglang.demo.reference import Job, Reference


def main(demo: Path, jobs_file: Path, out_file: Path) -> None:
    """Answer all jobs with Transformers and merged weights, and write them."""
    manifest = json.loads((demo / "manifest.json").read_text())
    adapters: dict[str, Path | str] = {entry["name"]: demo / entry["path"] for entry in manifest["adapters"]}
    jobs = [
        Job(tuple(job["input_ids"]), job["adapter"], job["max_new_tokens"], tuple(job.get("stop_ids", ())))
        for job in json.loads(jobs_file.read_text())
    ]
    answers = Reference(demo / manifest["model"], adapters).answer(jobs)
    out_file.write_text(json.dumps([{"output_ids": a.output_ids, "margins": a.margins} for a in answers]))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
