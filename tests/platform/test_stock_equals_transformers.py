"""Stock SGLang on the CPU platform answers like Transformers with merged weights: base and adapters in one batch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import pytest
from support import live, oracle_client
from support.demo_paths import Demo
from tokenizers import Tokenizer

from elora_sglang.demo import check

# Not the rsLoRA adapter: stock SGLang scales it by alpha / rank, whatever its config says.
NAMES = ("sql", "support", "french", "medical", "weather", "poetry", "gardening")
PROMPTS = 24
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def server(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.LiveServer]:
    flags = ("--max-loras-per-batch", str(len(NAMES) + 1), "--lora-paths", *demo.lora_paths(*NAMES))
    with live.server(
        demo.model, *flags, log_dir=tmp_path_factory.mktemp("stock"), name="stock", boot_timeout=600
    ) as running:
        yield running


@pytest.fixture(scope="module")
def encoder(demo: Demo) -> Tokenizer:
    return Tokenizer.from_file(str(demo.model / "tokenizer.json"))


def test_no_flag_is_needed_for_a_cpu(server: live.LiveServer) -> None:
    """What the platform filled in; the fixture gave no attention, sampling, LoRA or memory flag."""
    info = server.get("/server_info").json()
    filled = {"attention_backend": "elora_cpu", "lora_backend": "torch_native", "dtype": "float32"}
    filled |= {"sampling_backend": "pytorch", "max_running_requests": 32}
    assert {name: info[name] for name in filled} == filled
    assert info["max_total_num_tokens"] == 32768


def test_mixed_batch_equals_merged_weights(
    server: live.LiveServer, demo: Demo, encoder: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """24 prompts over seven adapters and the base model, sent as one batch."""
    owners = [None, *NAMES]
    jobs = [
        (encoder.encode(prompt).ids, owners[i % len(owners)], NEW_TOKENS)
        for i, prompt in enumerate(check.prompts()[:PROMPTS])
    ]
    expected = oracle_client.ask(
        demo.model,
        {name: demo.adapters[name] for name in NAMES},
        jobs,
        work_dir=tmp_path_factory.mktemp("oracle"),
    )
    answers = server.generate(
        input_ids=[ids for ids, _, _ in jobs],
        lora_path=[name for _, name, _ in jobs],
        max_new_tokens=NEW_TOKENS,
    )
    faults = {
        (i, jobs[i][1]): fault
        for i, (want, got) in enumerate(zip(expected, answers, strict=True))
        if (fault := oracle_client.compare(want, got["output_ids"])) is not None
    }
    assert not faults
    assert len({tuple(answer["output_ids"]) for answer in answers}) > PROMPTS * 0.8


def test_cache_hit_gives_the_same_log_probabilities(
    server: live.LiveServer, demo: Demo, encoder: Tokenizer
) -> None:
    """The rectangle after a prefix and the whole square give the same numbers."""
    long = encoder.encode("".join(check.prompts()[:40])).ids
    assert len(long) > 300
    fresh = _last_log_probs(server, long, "sql", flush=True)
    for cut in (1, 7, 100):
        assert server.post("/flush_cache").status == 200
        server.generate(input_ids=long[:-cut], lora_path="sql", max_new_tokens=1)
        again = _last_log_probs(server, long, "sql", flush=False)
        assert again[0] >= len(long) - cut - 1, "the prefix was not found in the cache"
        assert again[1] == fresh[1]
        assert max(abs(a - b) for a, b in zip(again[2], fresh[2], strict=True)) < 1e-4


def _last_log_probs(
    server: live.LiveServer, ids: list[int], adapter: str, *, flush: bool
) -> tuple[int, list[int], list[float]]:
    """(cached tokens, generated ids, their log-probabilities)."""
    if flush:
        assert server.post("/flush_cache").status == 200
    answer = server.generate(input_ids=ids, lora_path=adapter, max_new_tokens=4, return_logprob=True)
    meta = answer["meta_info"]
    entries = meta["output_token_logprobs"]
    return meta["cached_tokens"], [entry[1] for entry in entries], [entry[0] for entry in entries]


def test_streamed_chunks_have_text(server: live.LiveServer) -> None:
    """Every generated id has a text of its own: a client sees the first token when it is made, and each chunk grows.

    A busy detokenizer may put two tokens into one chunk, so the chunks are not counted."""
    reply = server.post(
        "/generate",
        {
            "text": check.prompts()[0],
            "stream": True,
            "sampling_params": {"temperature": 0, "max_new_tokens": 8},
        },
    )
    chunks = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    texts = [chunk["text"] for chunk in chunks]
    assert len(texts) > 2
    assert texts[0] != ""
    assert all(len(a) < len(b) for a, b in itertools.pairwise(texts))
