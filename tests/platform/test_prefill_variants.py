"""Pages of 16, chunked prefill, mixed batches, cache hits, n > 1, two tensor-parallel ranks: Transformers' tokens.

White-box speed: the engines are forked from one script each; ``test_stock_equals_transformers.py`` boots the stock way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support import live, oracle_client
from support.demo_paths import Demo
from tokenizers import Tokenizer

from elora_sglang.demo import check

NAMES = ("sql", "poetry", "code")
NEW_TOKENS = 10
Job = tuple[list[int], str | None, int]


@pytest.fixture(scope="module")
def jobs(demo: Demo) -> list[Job]:
    """Growing dialogs of 60 to 400 tokens: the second of each pair hits the cache of the first."""
    tokenizer = Tokenizer.from_file(str(demo.model / "tokenizer.json"))
    owners = [None, *NAMES]
    found: list[Job] = []
    for dialog in range(6):
        for turns in (4, 4 + 4 * dialog):
            text = "".join(check.prompts()[8 * dialog : 8 * dialog + turns])
            found.append((tokenizer.encode(text).ids, owners[dialog % len(owners)], NEW_TOKENS))
    return found


def run_engine(demo: Demo, jobs: list[Job], work: Path, *, passes: int, n: int, **engine: Any) -> Any:
    request, answers = work / "request.json", work / "answers.json"
    engine |= {"model_path": str(demo.model), "lora_paths": demo.lora_paths(*NAMES)}
    keys = ("input_ids", "adapter", "max_new_tokens")
    plain = [dict(zip(keys, job, strict=True)) for job in jobs]
    request.write_text(json.dumps({"engine": engine, "jobs": plain, "passes": passes, "n": n}))
    script = live.ROOT / "tests" / "support" / "engine_run.py"
    status, output = live.run(
        [sys.executable, str(script), str(request), str(answers)], log=work / "engine.log", timeout=800
    )
    assert status == 0, f"the engine ended with {status}:\n{output[-4000:]}"
    return json.loads(answers.read_text())


@pytest.mark.parametrize(
    ("engine", "passes", "n"),
    [
        ({"page_size": 16, "chunked_prefill_size": 64, "enable_mixed_chunk": True}, 2, 1),
        ({"tp_size": 2, "disable_overlap_schedule": True}, 1, 2),
    ],
    ids=["pages-chunks-mixed", "two-ranks-two-samples"],
)
def test_equals_transformers(
    demo: Demo, jobs: list[Job], tmp_path: Path, engine: dict[str, Any], passes: int, n: int
) -> None:
    """The second pass runs on cached prefixes."""
    adapters = {name: demo.adapters[name] for name in NAMES}
    expected = oracle_client.ask(demo.model, adapters, jobs, work_dir=tmp_path)
    found = run_engine(demo, jobs, tmp_path, passes=passes, n=n, **engine)
    assert len(found) == passes
    faults = {
        (turn, i, jobs[i][1], len(jobs[i][0])): fault
        for turn, answers in enumerate(found)
        for i, (want, got) in enumerate(zip(expected, answers, strict=True))
        for ids in got["output_ids"]
        if (fault := oracle_client.compare(want, ids)) is not None
    }
    assert not faults
    assert all(len(answer["output_ids"]) == n for answers in found for answer in answers)
    if passes > 1:
        cached = sum(answer["cached_tokens"] for answer in found[-1])
        assert cached > sum(len(ids) for ids, _, _ in jobs) * 0.7
