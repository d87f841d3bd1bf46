"""Pages of 16, chunked prefill and mixed batches, cache hits and n > 1: the same tokens as Transformers."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

import live
import oracle_client
import pytest
from conftest import Demo
from tokenizers import Tokenizer

from elora_sglang.demo import check

NAMES = ("sql", "poetry", "code")
CHUNK = 64
NEW_TOKENS = 10
FLAGS = ("--page-size", "16", "--chunked-prefill-size", str(CHUNK), "--enable-mixed-chunk")


@pytest.fixture(scope="module")
def server(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.LiveServer]:
    flags = (*FLAGS, "--lora-paths", *demo.lora_paths(*NAMES))
    with live.server(
        demo.model, *flags, log_dir=tmp_path_factory.mktemp("paged"), name="paged", boot_timeout=600
    ) as running:
        yield running


@pytest.fixture(scope="module")
def jobs(demo: Demo) -> list[tuple[list[int], str | None, int]]:
    """Growing dialogs of 60 to 400 tokens: the second of each pair hits the cache of the first."""
    tokenizer = Tokenizer.from_file(str(demo.model / "tokenizer.json"))
    owners = [None, *NAMES]
    found: list[tuple[list[int], str | None, int]] = []
    for dialog in range(6):
        for turns in (4, 4 + 4 * dialog):
            text = "".join(check.prompts()[8 * dialog : 8 * dialog + turns])
            found.append((tokenizer.encode(text).ids, owners[dialog % len(owners)], NEW_TOKENS))
    return found


def test_equals_transformers(
    server: live.LiveServer,
    demo: Demo,
    jobs: list[tuple[list[int], str | None, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Twice, so that the second pass runs on cached prefixes; requests overlap, so that batches mix."""
    adapters = {name: demo.adapters[name] for name in NAMES}
    expected = oracle_client.ask(demo.model, adapters, jobs, work_dir=tmp_path_factory.mktemp("oracle"))
    cached = []
    for _ in range(2):
        with concurrent.futures.ThreadPoolExecutor(max_workers=6) as clients:
            answers = list(
                clients.map(
                    lambda job: server.generate(input_ids=job[0], lora_path=job[1], max_new_tokens=job[2]),
                    jobs,
                )
            )
        faults = {
            (i, jobs[i][1], len(jobs[i][0])): fault
            for i, (want, got) in enumerate(zip(expected, answers, strict=True))
            if (fault := oracle_client.compare(want, got["output_ids"])) is not None
        }
        assert not faults
        cached.append(sum(answer["meta_info"]["cached_tokens"] for answer in answers))
    assert cached[1] > sum(len(ids) for ids, _, _ in jobs) * 0.7


def test_several_samples_of_one_prompt(
    server: live.LiveServer,
    demo: Demo,
    jobs: list[tuple[list[int], str | None, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Greedy n = 3: three times the oracle's answer."""
    ids, adapter, count = jobs[3]
    want = oracle_client.ask(
        demo.model, demo.adapters, [(ids, adapter, count)], work_dir=tmp_path_factory.mktemp("samples")
    )[0]
    answers = server.generate(input_ids=ids, lora_path=adapter, max_new_tokens=count, sampling={"n": 3})
    assert [oracle_client.compare(want, answer["output_ids"]) for answer in answers] == [None] * 3
