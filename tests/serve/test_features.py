"""SGLang's request features on a live ``--elora`` server: what must work with any prefix cache, works here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import live
from support.demo_paths import Demo

POOL = 8192


@pytest.fixture(scope="module")
def server(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.LiveServer]:
    with live.server(
        demo.model, "--elora", "--max-total-tokens", str(POOL), "--chunked-prefill-size", "128",
        "--elora-audit-interval", "5", "--enable-cache-report", "--enable-metrics",
        "--lora-paths", *demo.lora_paths("sql", "french", "legal"),
        log_dir=tmp_path_factory.mktemp("log"),
    ) as running:  # fmt: skip
        yield running
        assert running.alive(), running.tail()


def state(server: live.LiveServer) -> dict[str, Any]:
    found: dict[str, Any] = server.get("/server_info").json()["internal_states"][0]["elora"]
    return found


def ids(seed: int, length: int) -> list[int]:
    return [10 + (seed * 131 + i * i * 7 + i) % 1600 for i in range(length)]


def cached(answer: dict[str, Any]) -> int:
    return int(answer["meta_info"]["cached_tokens"])


def test_several_samples_share_one_prompt(server: live.LiveServer) -> None:
    prompt = ids(1, 60)
    alone = server.generate(input_ids=prompt, lora_path="sql", max_new_tokens=8)
    three = server.generate(input_ids=prompt, lora_path="sql", max_new_tokens=8, sampling={"n": 3})
    assert [answer["output_ids"] for answer in three] == [alone["output_ids"]] * 3
    assert all(cached(answer) > 0 for answer in three)


def test_log_probs_do_not_depend_on_the_cache(server: live.LiveServer) -> None:
    prompt = ids(2, 80)
    asked = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
    runs = [
        server.generate(input_ids=prompt, lora_path="french", max_new_tokens=6, **asked)["meta_info"]
        for _ in range(2)
    ]
    for kind in ("input_token_logprobs", "output_token_logprobs"):
        first, second = ([entry[0] for entry in run[kind][1:]] for run in runs)
        assert len(first) == len(second) > 0
        assert second == pytest.approx(first, abs=2e-4)
    base = server.generate(input_ids=prompt, max_new_tokens=6, **asked)["meta_info"]
    assert [e[0] for e in base["output_token_logprobs"]] != pytest.approx(
        [e[0] for e in runs[0]["output_token_logprobs"]], abs=2e-4
    )


def test_grammar_constrains_an_adapter(server: live.LiveServer) -> None:
    pattern = r"(yes|no), [0-9]{2}"
    answer = server.generate(
        "Is it?", lora_path="legal", max_new_tokens=24, sampling={"regex": pattern, "ignore_eos": False}
    )
    assert re.fullmatch(pattern, answer["text"]), answer["text"]


def test_base_request_cannot_borrow_an_adapters_namespace(server: live.LiveServer) -> None:
    """Stock joins ``extra_key`` and the adapter's id: a base request that sends the id hits the adapter's KV."""
    prompt = ids(3, 70)
    with_adapter = server.generate(input_ids=prompt, lora_path="sql", max_new_tokens=8)
    base = server.generate(input_ids=prompt, max_new_tokens=8)
    names = state(server)["resident_adapters"]
    assert names
    for lora_id in names:
        borrowed = server.generate(input_ids=prompt, max_new_tokens=8, extra_key=lora_id)
        assert cached(borrowed) == 0
        assert borrowed["output_ids"] == base["output_ids"] != with_adapter["output_ids"]


def test_an_internal_id_is_no_way_around_the_names(server: live.LiveServer) -> None:
    """``lora_id`` is a field of SGLang's request; a client that sets it gets the base model, and the server lives."""
    prompt = ids(10, 40)
    base = server.generate(input_ids=prompt, max_new_tokens=8)["output_ids"]
    for lora_id in ("no-such-id", *state(server)["resident_adapters"]):
        assert server.generate(input_ids=prompt, max_new_tokens=8, lora_id=lora_id)["output_ids"] == base
    assert server.alive()


@pytest.mark.parametrize("field", ["extra_key", "cache_salt"])
def test_namespaces_keep_their_prefixes_apart(server: live.LiveServer, field: str) -> None:
    prompt = ids(4 if field == "extra_key" else 5, 70)
    ask = {"input_ids": prompt, "lora_path": "sql", "max_new_tokens": 4}
    first = server.generate(**ask, **{field: "one"})
    other = server.generate(**ask, **{field: "two"})
    again = server.generate(**ask, **{field: "one"})
    assert (cached(first), cached(other)) == (0, 0)
    assert cached(again) == len(prompt) - 1
    assert first["output_ids"] == other["output_ids"] == again["output_ids"]


def test_follow_up_reuses_prompt_and_answer(server: live.LiveServer) -> None:
    prompt = ids(6, 300)  # longer than a chunk
    first = server.generate(input_ids=prompt, lora_path="french", max_new_tokens=20)
    follow = server.generate(
        input_ids=prompt + first["output_ids"] + ids(7, 10), lora_path="french", max_new_tokens=4
    )
    assert cached(follow) >= len(prompt) + 19


def test_flush_keeps_adapters_usable(server: live.LiveServer) -> None:
    prompt = ids(8, 50)
    before = server.generate(input_ids=prompt, lora_path="legal", max_new_tokens=8)
    assert server.post("/flush_cache").status == 200
    assert state(server)["free_slots"] == POOL
    after = server.generate(input_ids=prompt, lora_path="legal", max_new_tokens=8)
    assert cached(after) == 0
    assert after["output_ids"] == before["output_ids"]


def test_flush_is_refused_while_requests_run(server: live.LiveServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.generate, input_ids=ids(9, 50), lora_path="sql", max_new_tokens=400)
        while state(server)["protected_slots"] == 0 and not running.done():
            pass
        assert not running.done()
        assert server.post("/flush_cache").status == 400
        assert len(running.result()["output_ids"]) == 400


def test_metrics_are_exported(server: live.LiveServer) -> None:
    text = server.get("/metrics").text
    assert "sglang:evicted_tokens_total" in text or "sglang:cache_hit_rate" in text
    assert state(server)["audit_faults"] == 0


def test_sglangs_own_benchmark_client_works(server: live.LiveServer, tmp_path: Path) -> None:
    """``python -m sglang.benchmark.serving`` with its LoRA flags, as users run it against stock SGLang."""
    out = tmp_path / "out.jsonl"
    assert server.post("/flush_cache").status == 200
    before = state(server)["done"]["adapter_loads"]
    command = [
        sys.executable, "-m", "sglang.benchmark.serving", "--backend", "sglang",
        "--base-url", server.url, "--dataset-name", "random-ids", "--num-prompts", "12",
        "--random-input-len", "48", "--random-output-len", "6", "--request-rate", "8", "--seed", "1",
        "--lora-name", "sql", "french", "legal", "--lora-request-distribution", "distinct",
        "--output-file", str(out), "--disable-tqdm",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text().splitlines()[-1])
    assert result["completed"] == 12 and result["mean_ttft_ms"] > 0
    assert state(server)["done"]["adapter_loads"] >= before + 3, "the requests were for three adapters"
