"""SGLang's own prefix cache and the simulator's tree, asked the same in the same order, find the same."""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import seeds

from elora_sglang.eval.baselines import record
from elora_sglang.eval.baselines.patches import RECORDED
from elora_sglang.eval.sim import recorded
from elora_sglang.eval.trees.caches import StockCache


@pytest.fixture
def recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """SGLang's class with the hooks around its methods, as a baseline server has them; yields the record."""
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    path = tmp_path / "order.jsonl"
    monkeypatch.setenv(record.ENV_RECORD, str(path))
    monkeypatch.setattr(record, "_file", None)
    for method, name in RECORDED.items():
        original = getattr(UnifiedRadixCache, method)
        hook: Callable[..., Any] = getattr(record, name)

        def around(*args: Any, _hook: Any = hook, _original: Any = original, **kwargs: Any) -> Any:
            return _hook(_original, *args, **kwargs)

        monkeypatch.setattr(UnifiedRadixCache, method, around)
    yield path
    if record._file is not None:
        record._file.close()


def drive(seed: int, core: str, steps: int = 400) -> None:
    """Requests of three adapters that share prefixes; each is matched, locked, inserted, unlocked, and some evict."""
    rng = random.Random(seed)
    stock = StockCache(f"sglang unified {core}", 1)
    texts = [array("q", (rng.randrange(6) for _ in range(60))) for _ in range(12)]
    running: list[Any] = []
    for _ in range(steps):
        adapter, text = rng.choice("abc"), rng.choice(texts)
        tokens = text[: rng.randint(2, 50)] + array("q", (rng.randrange(6) for _ in range(rng.randint(1, 8))))
        _, node = stock.match(adapter, tokens)
        before = stock.cache.lock(node)
        end = stock.insert(adapter, tokens, torch.arange(len(tokens)))
        after = stock.cache.lock(end)
        stock.cache.unlock(before)
        running.append(after)
        if len(running) > 4:
            stock.cache.unlock(running.pop(rng.randrange(4)))
        if rng.random() < 0.3:
            stock.evict(rng.randint(1, 60))


@pytest.mark.parametrize("core", ["python", "rust"])
def test_what_stock_finds_and_evicts_is_found_and_evicted(core: str, recording: Path) -> None:
    drive(seeds.draw(), core)
    found = recorded.replay(recording.read_text().splitlines())
    assert found.difference is None, found.difference
    assert found.matches == 400 and found.recorded == found.replayed and found.recorded[0] > 1000
    assert found.evicted[0] > 1000


def test_another_answer_is_noticed(recording: Path) -> None:
    drive(5, "python")
    lines = recording.read_text().splitlines()
    number = next(i for i, line in enumerate(lines) if json.loads(line)[0] == "match" and json.loads(line)[3])
    event = json.loads(lines[number])
    event[3] += 1
    lines[number] = json.dumps(event)
    found = recorded.replay(lines)
    assert found.difference is not None and found.difference.startswith(f"event {number + 1} (match): found")


def test_what_is_no_record_is_refused() -> None:
    with pytest.raises(ValueError, match="not a record of a cache"):
        recorded.replay(["{"])
