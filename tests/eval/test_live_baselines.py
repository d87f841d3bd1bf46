"""HiCache as a baseline on the CPU: real host hits with equal tokens, and a control that makes them wrong."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support import live
from support.demo_paths import Demo

from elora_sglang.eval import baselines
from elora_sglang.eval.baselines.patches import PATCHES

pytestmark = pytest.mark.full

PROMPT, COUNT, LINK_GBPS = 500, 6, 0.05
FLAGS = (
    *(
        "--enable-lora",
        "--lora-backend",
        "torch_native",
        "--max-loras-per-batch",
        "3",
        "--max-lora-rank",
        "64",
    ),
    *("--dtype", "float32", "--max-total-tokens", "1600", "--max-running-requests", "4"),
    *("--enable-hierarchical-cache", "--hicache-ratio", "4"),
    *("--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"),
)


def two_rounds(demo: Demo, folder: Path, **env: str) -> tuple[list[Any], list[Any], Mapping[str, Any]]:
    """The same prompts twice, more of them than the device holds; answers of both rounds, and the report."""
    rng = random.Random(7)
    prompts = [[rng.randrange(5, 1000) for _ in range(PROMPT)] for _ in range(COUNT)]
    names = list(demo.adapters)[:2]
    flags = (*FLAGS, "--lora-paths", *demo.lora_paths(*names))
    environment = live.clean_env(**{baselines.ENV_LINK: str(LINK_GBPS)}, **env)
    with live.server(demo.model, *flags, log_dir=folder, env=environment, module=baselines.LAUNCH) as server:
        rounds = [
            [
                server.generate(input_ids=ids, lora_path=names[i % 2], max_new_tokens=8)
                for i, ids in enumerate(prompts)
            ]
            for _ in range(2)
        ]
        report = server.get("/server_info").json()["internal_states"][0]["baseline"]
    return rounds[0], rounds[1], report


def test_host_hits_give_the_same_tokens_and_the_link_was_there(demo: Demo, tmp_path: Path) -> None:
    first, second, report = two_rounds(demo, tmp_path)
    hits = [answer["meta_info"]["cached_tokens_details"]["host"] for answer in second]
    assert sum(hit >= PROMPT - 1 for hit in hits) >= COUNT - 2, hits
    assert [a["output_ids"] for a in first] == [a["output_ids"] for a in second]
    assert set(report["hooks"]) == {patch.name for patch in PATCHES}
    assert report["moved_bytes"]["load"] > 0
    assert report["moved_bytes"]["save"] > 0
    assert report["stood_still_s"] > 0


def test_loads_scaled_by_a_half_change_the_tokens(demo: Demo, tmp_path: Path) -> None:
    first, second, _ = two_rounds(demo, tmp_path, ELORA_EVAL_BREAK_LOADS="0.5")
    assert [a["output_ids"] for a in first] != [a["output_ids"] for a in second]
