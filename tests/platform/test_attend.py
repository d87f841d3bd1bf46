"""The CPU attention's arithmetic against plain eager attention, for every shape a batch can have; and its cost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from elora_sglang.platform import attend

HEAD_DIM = 16
SEEDS = range(12)


@dataclass
class Batch:
    """A random pool and requests over it: ``new`` query rows after ``prefix`` cached tokens each."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    pool_rows: list[int]
    new: list[int]
    prefix: list[int]

    @property
    def total(self) -> list[int]:
        return [n + p for n, p in zip(self.new, self.prefix, strict=True)]

    def run(self, **options: float) -> torch.Tensor:
        output = torch.full_like(self.query, float("nan"))
        for group in attend.plan(self.table, self.pool_rows, self.new, self.total):
            attend.attend(group, self.query, output, self.keys, self.values, scaling=0.3, **options)
        return output


def make_batch(
    rng: random.Random, new: list[int], prefix: list[int], *, heads: int, kv_heads: int, page: int = 1
) -> Batch:
    """Requests in random slots; whole pages of ``page`` slots each, in random order."""
    torch.manual_seed(rng.randrange(1 << 30))
    total = [n + p for n, p in zip(new, prefix, strict=True)]
    pages = [-(-t // page) for t in total]
    order = torch.randperm(sum(pages)) + 1
    slots = (order[:, None] * page + torch.arange(page)).reshape(-1)
    pool = int(slots.max()) + 1 + page
    table = torch.zeros(len(new) + 2, max(total) + 5, dtype=torch.int32)
    pool_rows = rng.sample(range(len(new) + 2), len(new))
    at = 0
    for row, length, count in zip(pool_rows, total, pages, strict=True):
        table[row, :length] = slots[at : at + length]
        at += count * page
    keys, values = torch.randn(2, pool, kv_heads, HEAD_DIM)
    unused = torch.ones(pool, dtype=torch.bool)
    unused[slots] = False
    keys[unused], values[unused] = float("nan"), float("nan")  # a slot that is nobody's must not be read
    return Batch(torch.randn(sum(new), heads, HEAD_DIM), keys, values, table, pool_rows, new, prefix)


def eager(batch: Batch, *, logit_cap: float = 0.0, window: int = -1) -> torch.Tensor:
    """Textbook attention in double precision, one request and one full mask at a time."""
    rows, start = [], 0
    for row, new, prefix in zip(batch.pool_rows, batch.new, batch.prefix, strict=True):
        slots = batch.table[row, : new + prefix].long()
        share = batch.query.shape[1] // batch.keys.shape[1]
        k = batch.keys[slots].double().repeat_interleave(share, dim=1)
        v = batch.values[slots].double().repeat_interleave(share, dim=1)
        q = batch.query[start : start + new].double()
        scores = torch.einsum("thd,shd->hts", q, k) * 0.3
        if logit_cap:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        position = torch.arange(new)[:, None] + prefix
        seen = torch.arange(new + prefix) <= position
        if window >= 0:
            seen &= torch.arange(new + prefix) >= position - window
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        rows.append(torch.einsum("hts,shd->thd", weights, v))
        start += new
    return torch.cat(rows)


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_random_batches_equal_eager_attention(seed: int, heads: int, page: int) -> None:
    """Prefill, hits, chunks and decodes mixed, ragged and equal lengths, grouped heads."""
    rng = random.Random(seed)
    print(f"seed {seed}")
    count = rng.randint(1, 7)
    new = [rng.choice([1, 1, 2, 5, 17, 300]) for _ in range(count)]
    prefix = [rng.choice([0, 0, 1, 16, 40, 400]) for _ in range(count)]
    batch = make_batch(rng, new, prefix, heads=heads, kv_heads=2, page=page)
    assert (batch.run().double() - eager(batch)).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{"logit_cap": 5.0}, {"window": 10}, {"logit_cap": 5.0, "window": 3}])
@pytest.mark.parametrize("seed", SEEDS[:4])
def test_logit_cap_and_sliding_window(seed: int, options: dict[str, float]) -> None:
    rng = random.Random(seed)
    batch = make_batch(rng, [1, 1, 30, 300], [50, 3, 0, 20], heads=4, kv_heads=2)
    assert (batch.run(**options).double() - eager(batch, **options)).abs().max() < 1e-5  # type: ignore[arg-type]
    assert (eager(batch, **options) - eager(batch)).abs().max() > 1e-3  # type: ignore[arg-type]  # it matters


def test_decode_of_many_requests_shares_calls(calls: list[tuple[int, int, int]]) -> None:
    """Sixteen requests of similar length are one call, not sixteen."""
    rng = random.Random(0)
    batch = make_batch(rng, [1] * 16, [100 + i for i in range(16)], heads=4, kv_heads=2)
    assert (batch.run().double() - eager(batch)).abs().max() < 1e-5
    assert len(calls) == 1


def test_a_cache_hit_costs_only_its_new_tokens(calls: list[tuple[int, int, int]]) -> None:
    """Score entries computed for 50 new tokens after 2,000 cached ones: 50 rows of keys, no square."""
    rng = random.Random(0)
    new, prefix = 50, 2000
    make_batch(rng, [new], [prefix], heads=4, kv_heads=2).run()
    hit = sum(entries for _, _, entries in calls)
    assert hit == 4 * new * (prefix + new)
    calls.clear()
    make_batch(rng, [prefix + new], [0], heads=4, kv_heads=2).run()
    square = sum(entries for _, _, entries in calls)
    assert square > 40 * hit


def test_a_long_chunk_skips_keys_it_cannot_see(calls: list[tuple[int, int, int]]) -> None:
    """A chunk of 1,024 rows after 1,024 cached tokens is computed in blocks that stop at their last key."""
    rng = random.Random(0)
    make_batch(rng, [1024], [1024], heads=2, kv_heads=2).run()
    assert len(calls) == 1024 // attend.ROWS_PER_BLOCK
    assert sum(entries for _, _, entries in calls) < 2 * 1024 * 2048 * 0.85


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_pool_dtypes(stored: torch.dtype) -> None:
    """KV of another dtype is read as it was stored, then converted to the query's dtype."""
    rng = random.Random(3)
    batch = make_batch(rng, [1, 4, 20], [30, 0, 16], heads=4, kv_heads=2)
    batch.keys, batch.values = batch.keys.to(stored), batch.values.to(stored)
    got = batch.run()
    batch.keys, batch.values = batch.keys.float(), batch.values.float()
    assert (got.double() - eager(batch)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_queries(dtype: torch.dtype) -> None:
    rng = random.Random(4)
    batch = make_batch(rng, [1, 1, 9, 300], [30, 31, 16, 64], heads=4, kv_heads=2)
    exact = eager(batch)
    batch.query, batch.keys, batch.values = (t.to(dtype) for t in (batch.query, batch.keys, batch.values))
    got = batch.run()
    assert got.dtype == dtype
    assert (got.double() - exact).abs().max() < 0.05


def test_a_wrong_mask_would_be_seen() -> None:
    """Negative control: one key too many in the mask is far above the tolerance."""
    rng = random.Random(5)
    batch = make_batch(rng, [20], [30], heads=4, kv_heads=2)
    group = attend.plan(batch.table, batch.pool_rows, batch.new, batch.total)[0]
    group.last_key += 1
    output = torch.zeros_like(batch.query)
    attend.attend(group, batch.query, output, batch.keys, batch.values, scaling=0.3)
    assert (output.double() - eager(batch)).abs().max() > 1e-2


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, int]]]:
    """Every attention call as (query rows, keys, score entries over all heads)."""
    seen: list[tuple[int, int, int]] = []
    original = attend.scaled_dot_product_attention

    def counted(query: torch.Tensor, key: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        rows = query.shape[0] * query.shape[1] * query.shape[2]
        seen.append((query.shape[2], key.shape[2], rows * key.shape[2]))
        return original(query, key, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(attend, "scaled_dot_product_attention", counted)
    yield seen
