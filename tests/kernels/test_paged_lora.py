"""The paged LoRA reference against plain matrix products in float64."""

from __future__ import annotations

import random

import pytest
import torch

from elora_sglang.eval.gpu.cases.paged_lora import MODULE, Inputs, make_inputs
from elora_sglang.kernels.paged_lora import add_lora, expand, plan_segments, shrink

MIXED = [1, 4, 8, 12, 64]

#: Prefill, decode and mixtures: (adapter or None, rows) per request; base rows and empty segments included.
BATCHES: dict[str, list[tuple[int | None, int]]] = {
    "prefill": [(0, 7), (None, 5), (1, 40), (2, 3), (3, 9), (4, 17)],
    "decode, interleaved": [(i % 5 if i % 6 else None, 1) for i in range(30)],
    "empty segments": [(0, 0), (1, 3), (None, 0), (2, 0), (1, 2), (4, 0)],
    "neighbours merge": [(3, 2), (3, 5), (3, 1), (0, 4)],
    "base only": [(None, 4), (None, 1)],
    "nothing": [],
    "long runs, no regrouping": [(0, 60), (1, 60), (0, 60), (1, 60)],
}


def close(inputs: Inputs, found: torch.Tensor, expected: torch.Tensor | None = None) -> None:
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}[inputs.x.dtype]
    reference = inputs.expected() if expected is None else expected
    torch.testing.assert_close(found.double(), reference, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scattered", [False, True], ids=["contiguous", "scattered"])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
def test_mixed_lora_ranks(
    rows: list[tuple[int | None, int]], dtype: torch.dtype, page_size: int, scattered: bool
) -> None:
    inputs = make_inputs(
        seed=1, ranks=MIXED, rows=rows, dtype=dtype, page_size=page_size, scattered=scattered
    )
    out = inputs.out.clone()
    result = add_lora(inputs.x, out, inputs.batch(), 0, MODULE)
    assert result.data_ptr() == out.data_ptr(), "must work in place on the base output"
    close(inputs, out)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_fused_module_with_missing_parts(kv_dtype: torch.dtype) -> None:
    """q and v without k, different LoRA ranks per part, weights wider than the pool's own type."""
    ranks = [(8, 0, 8), (16, 2, 4), (0, 3, 0), 5]
    rows = [(0, 3), (1, 4), (None, 2), (2, 5), (3, 1), (0, 1)]
    inputs = make_inputs(seed=2, ranks=ranks, rows=rows, widths=(64, 16, 16), kv_dtype=kv_dtype)
    out = inputs.out.clone()
    add_lora(inputs.x, out, inputs.batch(), 0, MODULE)
    close(inputs, out)


@pytest.mark.parametrize("rows", BATCHES.values(), ids=BATCHES.keys())
def test_shrink_and_expand_are_the_halves_of_add_lora(rows: list[tuple[int | None, int]]) -> None:
    inputs = make_inputs(seed=3, ranks=MIXED, rows=rows, widths=(32, 16), scattered=True)
    batch, out = inputs.batch(), inputs.out.clone()
    expand(shrink(inputs.x, batch, 0, MODULE), out, batch, 0, MODULE)
    close(inputs, out)


def test_shrink_of_input_shards_adds_up() -> None:
    """Row-parallel: each tp rank shrinks its half of the input, the sum is what one rank would compute."""
    rows = [(0, 3), (None, 2), (1, 4), (0, 1), (1, 1), (0, 1)]
    whole = make_inputs(seed=4, ranks=[4, 12], rows=rows)
    halves = []
    for part in (slice(0, 32), slice(32, 64)):
        half = make_inputs(seed=4, ranks=[4, 12], rows=rows, in_features=32)
        for adapter, (a, b) in zip(half.adapters, whole.matrices, strict=True):
            adapter.write(lambda _, a=a[:, part], b=b: {(MODULE, 0): a, (MODULE, 1): b})
        halves.append(shrink(whole.x[:, part], half.batch(), 0, MODULE))
    torch.testing.assert_close(sum(halves), shrink(whole.x, whole.batch(), 0, MODULE), atol=1e-5, rtol=1e-5)


def test_base_rows_and_rows_behind_the_batch_stay_untouched() -> None:
    rows = [(None, 3), (0, 2), (None, 4)]
    inputs = make_inputs(seed=5, ranks=[8], rows=rows)
    x = torch.cat((inputs.x, torch.full((5, 64), float("nan"))))  # padding rows, never to be read
    out = torch.cat((inputs.out, torch.zeros(5, 64)))
    before = out.clone()
    add_lora(x, out, inputs.batch(), 0, MODULE)
    changed = (out != before).any(dim=1)
    assert changed.tolist() == [False] * 3 + [True] * 2 + [False] * 9


def test_adapter_without_the_module_is_skipped() -> None:
    inputs = make_inputs(seed=6, ranks=[8], rows=[(0, 3)])
    out = inputs.out.clone()
    add_lora(inputs.x, out, inputs.batch(), 0, "another module")
    assert torch.equal(out, inputs.out)


def test_swapped_pages_change_the_result() -> None:
    """Negative control: the comparison above notices a page table that is wrong in one place.

    A and B of different widths: if a page held the same LoRA-rank rows of both, swapping two pages
    would only reorder the LoRA rank and rightly change nothing.
    """
    inputs = make_inputs(seed=7, ranks=[64], rows=[(0, 9)], widths=(48,), page_size=16)
    out = inputs.out.clone()
    close(inputs, add_lora(inputs.x, out, inputs.batch(), 0, MODULE))
    adapter = inputs.adapters[0]
    for stream in (0, 1):
        rows = adapter.pool.byte_rows(0, stream)
        first, second = adapter.slots[:16], adapter.slots[16:32]
        rows[first], rows[second] = rows[second].clone(), rows[first].clone()
    out = inputs.out.clone()
    add_lora(inputs.x, out, inputs.batch(), 0, MODULE)
    with pytest.raises(AssertionError):
        close(inputs, out)


def test_segments_cover_exactly_the_active_rows() -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(300):
        adapters = [None, *(object() for _ in range(rng.randint(1, 6)))]
        indices = [rng.randrange(len(adapters)) for _ in range(rng.randint(0, 40))]
        lengths = [rng.choice([0, 1, 1, 1, 2, 30]) for _ in indices]
        batch = plan_segments(lengths, indices, adapters, [float(i) for i in range(len(adapters))])  # type: ignore[arg-type]
        owner = [i for i, n in zip(indices, lengths, strict=True) for _ in range(n)]
        order = list(range(len(owner))) if batch.order is None else batch.order.tolist()
        seen: dict[int, int] = {}
        for segment in batch.segments:
            for position in range(segment.start, segment.stop):
                assert order[position] not in seen
                seen[order[position]] = int(segment.scaling)
                assert segment.adapter is adapters[int(segment.scaling)]
        assert seen == {row: index for row, index in enumerate(owner) if index}
        if batch.order is not None:
            assert len(batch.segments) == len({i for i in owner if i})


def test_decode_tokens_of_one_adapter_are_brought_together() -> None:
    adapters = [None, object(), object()]
    batch = plan_segments([1] * 32, [1, 2] * 16, adapters, [0.0, 1.0, 1.0])  # type: ignore[arg-type]
    assert len(batch.segments) == 2
    assert batch.order is not None and batch.order.tolist() == [*range(0, 32, 2), *range(1, 32, 2)]
