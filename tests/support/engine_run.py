"""Script of its own process: an Engine by fork, one list of greedy jobs, the answers as JSON.

    python engine_run.py REQUEST.json ANSWERS.json

REQUEST.json: {"engine": {keyword: value}, "jobs": [{"input_ids", "adapter", "max_new_tokens"}], "passes": N, "n": N}.
ANSWERS.json: per pass and job {"output_ids": [[..] per sample], "cached_tokens": N}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support import live


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    jobs = request["jobs"]
    count = request["n"]
    passes = []
    with live.forked_engine(log_level="error", **request["engine"]) as engine:
        for _ in range(request["passes"]):
            answers: list[dict[str, Any]] = engine.generate(
                input_ids=[job["input_ids"] for job in jobs],
                lora_path=[job["adapter"] for job in jobs],
                sampling_params=[
                    {
                        "temperature": 0,
                        "ignore_eos": True,
                        "max_new_tokens": job["max_new_tokens"],
                        "n": count,
                    }
                    for job in jobs
                ],
            )
            passes.append(
                [
                    {
                        "output_ids": [a["output_ids"] for a in answers[i * count : (i + 1) * count]],
                        "cached_tokens": answers[i * count]["meta_info"]["cached_tokens"],
                    }
                    for i in range(len(jobs))
                ]
            )
    Path(sys.argv[2]).write_text(json.dumps(passes))


if __name__ == "__main__":
    main()
