"""Ask the Transformers oracle (``tests/oracle/generate.py``) from a test, in a clean process."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from support import live

CACHE = live.ROOT / ".demo" / "oracle"


@dataclass(frozen=True)
class OracleAnswer:
    """Greedy ids, and per id the logit gap to the runner-up."""

    output_ids: list[int]
    margins: list[float]


def ask(
    model: Path,
    adapters: Mapping[str, Path],
    jobs: Sequence[tuple[Sequence[int], str | None, int]],
    *,
    work_dir: Path,
    timeout: float = 900.0,
) -> list[OracleAnswer]:
    """Answers for ``(input_ids, adapter or None, max_new_tokens)`` jobs, in their order; fp32, merged weights.

    ``work_dir`` takes the exchanged files. Answers are cached under ``.demo/oracle`` by content. Raises RuntimeError
    with the oracle's output when it fails.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    request, answer = work_dir / "oracle-jobs.json", work_dir / "oracle-answers.json"
    request.write_text(
        json.dumps(
            {
                "model": str(model),
                "adapters": {name: str(path) for name, path in adapters.items()},
                "jobs": [
                    {"input_ids": list(ids), "adapter": name, "max_new_tokens": count}
                    for ids, name, count in jobs
                ],
            }
        )
    )
    script = live.ROOT / "tests" / "oracle" / "generate.py"
    status, output = live.run(
        [sys.executable, str(script), str(request), str(answer), "--cache", str(CACHE)],
        log=work_dir / "oracle.log",
        timeout=timeout,
    )
    if status != 0:
        raise RuntimeError(f"the oracle ended with {status}:\n{output[-4000:]}")
    return [OracleAnswer(**entry) for entry in json.loads(answer.read_text())]


def compare(expected: OracleAnswer, got: Sequence[int]) -> str | None:
    """What differs at the first difference, or None: position, both ids, and the oracle's margin there."""
    for at, (want, have) in enumerate(zip(expected.output_ids, got, strict=False)):
        if want != have:
            return f"token {at}: oracle {want}, server {have}, margin {expected.margins[at]:.2e}"
    if len(expected.output_ids) != len(got):
        return f"{len(expected.output_ids)} tokens from the oracle, {len(got)} from the server"
    return None
