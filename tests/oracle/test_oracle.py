"""The oracle against the most naive way to the same answer: no cache, no padding, no merging, one token at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support import live, oracle_client
from support.demo_paths import Demo
from tokenizers import Tokenizer

from elora_sglang.demo import check

NAIVE = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
request = json.load(open(sys.argv[1]))
answers = []
for job in request["jobs"]:
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32, attn_implementation="eager")
    if job["adapter"]:
        model = PeftModel.from_pretrained(model, request["adapters"][job["adapter"]]).float()
    ids = list(job["input_ids"])
    with torch.no_grad():
        for _ in range(job["max_new_tokens"]):
            ids.append(int(model.eval()(torch.tensor([ids])).logits[0, -1].argmax()))
    answers.append(ids[len(job["input_ids"]):])
assert "sglang" not in sys.modules
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def jobs(demo: Demo) -> list[tuple[list[int], str | None, int]]:
    tokenizer = Tokenizer.from_file(str(demo.model / "tokenizer.json"))
    owners = [None, "sql", "german", "weather", "medical"]
    prompts = check.prompts()
    return [
        (tokenizer.encode("".join(prompts[i : i + 1 + i % 3])).ids, owners[i % 5], 4 + i % 3)
        for i in range(10)
    ]


def test_equals_the_naive_way(
    demo: Demo, jobs: list[tuple[list[int], str | None, int]], tmp_path: Path
) -> None:
    found = oracle_client.ask(demo.model, demo.adapters, jobs, work_dir=tmp_path)
    status, output = live.run(
        [sys.executable, "-c", NAIVE, str(tmp_path / "oracle-jobs.json")],
        log=tmp_path / "naive.log",
        timeout=300,
    )
    assert status == 0, output[-3000:]
    assert [answer.output_ids for answer in found] == json.loads(output.splitlines()[-1])
    assert all(len(a.margins) == len(a.output_ids) and min(a.margins) > 0 for a in found)


def test_differences_name_token_and_margin() -> None:
    want = oracle_client.OracleAnswer([1, 2, 3], [0.5, 0.25, 1.0])
    assert oracle_client.compare(want, [1, 2, 3]) is None
    assert oracle_client.compare(want, [1, 9, 3]) == "token 1: oracle 2, server 9, margin 2.50e-01"
    assert oracle_client.compare(want, [1, 2]) == "3 tokens from the oracle, 2 from the server"


def test_an_unknown_adapter_is_an_error(demo: Demo, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="nobody"):
        oracle_client.ask(demo.model, demo.adapters, [([5, 6], "nobody", 1)], work_dir=tmp_path)
