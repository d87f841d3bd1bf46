"""Adapters written to pool slots and read back: exact bytes, and nobody else's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_pool import DTYPES, KV_DTYPES, LAYERS, SHAPES, make_layout, make_matrices, make_pool, walk

from elora_sglang.runtime.pool.packing import PackedAdapter
from elora_sglang.runtime.pool.views import UnifiedPool


def pages(count: int, page_size: int, order: list[int]) -> torch.Tensor:
    chosen = torch.tensor(order[: count // page_size])
    return (chosen[:, None] * page_size + torch.arange(page_size)).flatten()


def orders(total: int) -> dict[str, list[int]]:
    """Page orders: one run, random places, two runs, and a run handed over backwards."""
    shuffled = (1 + torch.randperm(total - 1, generator=torch.Generator().manual_seed(3))).tolist()
    run = list(range(1, total))
    return {"run": run, "scattered": shuffled, "two runs": run[40:45] + run[60:], "backwards": run[::-1]}


@pytest.mark.parametrize("order", orders(1024))
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip(dtype: torch.dtype, kv_dtype: torch.dtype, page_size: int, order: str) -> None:
    pool = make_pool(kv_dtype, page_size)
    layout = make_layout(pool, dtype)
    before = [[pool.byte_rows(layer, stream).clone() for stream in (0, 1)] for layer in range(LAYERS)]
    slots = pages(layout.slots, page_size, orders(1024 // page_size)[order])
    adapter, matrices = PackedAdapter(pool, layout, slots, dtype), make_matrices(dtype)
    adapter.write(matrices.__getitem__)

    for layer, stored in enumerate(adapter.read()):
        assert stored.keys() == matrices[layer].keys()
        for key, matrix in matrices[layer].items():
            assert torch.equal(stored[key].view(torch.uint8), matrix.view(torch.uint8)), (layer, key)
    for key, matrix in walk(pool, layout, slots, dtype, 1).items():
        assert torch.equal(matrix, matrices[1][key]), key
    others = torch.ones(pool.rows, dtype=torch.bool)
    others[slots] = False
    for layer in range(LAYERS):
        for stream in (0, 1):
            assert torch.equal(pool.byte_rows(layer, stream)[others], before[layer][stream][others])


@settings(max_examples=60, deadline=None, print_blob=True)
@given(order=st.permutations(range(1, 40)), page_size=st.sampled_from([1, 16]), data=st.data())
def test_any_slots_give_the_same_module_weights(
    order: list[int], page_size: int, data: st.DataObject
) -> None:
    kv_dtype = data.draw(st.sampled_from(KV_DTYPES))
    pool = make_pool(kv_dtype, page_size, slots=640)
    layout = make_layout(pool, torch.float32)
    spread = order if page_size == 16 else [page * 16 + i for page in order for i in range(16)]
    here = PackedAdapter(pool, layout, pages(layout.slots, page_size, spread), torch.float32)
    matrices = make_matrices(torch.float32)
    here.write(matrices.__getitem__)
    other = make_pool(kv_dtype, page_size)
    there = PackedAdapter(other, layout, pages(layout.slots, page_size, list(range(1, 1000))), torch.float32)
    there.write(matrices.__getitem__)
    for shape in SHAPES:
        found, expected = here.module(1, shape.name), there.module(1, shape.name)
        assert found is not None and expected is not None and found.rank_rows == expected.rank_rows
        for one, two in zip(found.shrink + found.expand, expected.shrink + expected.expand, strict=True):
            assert one[:-1] == two[:-1] and torch.equal(one.weight, two.weight)


def test_consecutive_slots_are_read_in_place() -> None:
    pool = make_pool(torch.float32, 1)
    layout = make_layout(pool, torch.float32)
    adapter = PackedAdapter(pool, layout, torch.arange(10, 10 + layout.slots).flip(0), torch.float32)
    adapter.write(make_matrices(torch.float32).__getitem__)
    weights = adapter.module(0, "qkv_proj")
    assert weights is not None and adapter.module(0, "qkv_proj") is weights, "found once, then kept"
    storage = {pool.byte_rows(0, s).untyped_storage().data_ptr() for s in (0, 1)}
    for part in weights.shrink + weights.expand:
        assert part.weight.untyped_storage().data_ptr() in storage, "a copy of weights outside the pool"
    pool.byte_rows(0, 0)[10:50].zero_()
    pool.byte_rows(0, 1)[10:50].zero_()
    assert all(not part.weight.any() for part in weights.shrink + weights.expand)


def test_scattered_slots_keep_no_second_copy() -> None:
    """After the bytes in the pool change, the next use sees the change."""
    pool = make_pool(torch.float32, 1)
    layout = make_layout(pool, torch.float32)
    slots = torch.arange(layout.slots) * 2 + 1
    adapter = PackedAdapter(pool, layout, slots, torch.float32)
    adapter.write(make_matrices(torch.float32).__getitem__)
    assert adapter.module(0, "qkv_proj") is not None
    for stream in (0, 1):
        pool.byte_rows(0, stream)[slots] = 0
    weights = adapter.module(0, "qkv_proj")
    assert weights is not None and not any(part.weight.any() for part in weights.shrink + weights.expand)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (lambda n: torch.arange(16, 16 + n - 16), "needs"),
        (lambda n: torch.cat((torch.arange(16, 16 + n - 16), torch.arange(16, 32))), "twice"),
        (lambda n: torch.arange(16 * 100, 16 * 100 + n), "outside the pool"),
        (lambda n: torch.arange(-16, n - 16), "outside the pool"),
        (lambda n: torch.arange(17, 17 + n), "whole pages"),
        (
            lambda n: torch.cat((torch.arange(16, 16 + n - 16), torch.arange(16 * 30 + 8, 16 * 31 + 8))),
            "whole pages",
        ),
    ],
)
def test_slots_that_cannot_hold_the_adapter_are_refused(slots, message: str) -> None:  # type: ignore[no-untyped-def]
    pool = make_pool(torch.float32, 16)
    layout = make_layout(pool, torch.float32)
    with pytest.raises(ValueError, match=message):
        PackedAdapter(pool, layout, slots(layout.slots), torch.float32)


def test_wrong_matrices_are_refused() -> None:
    pool = make_pool(torch.float32, 1)
    layout = make_layout(pool, torch.float32)
    adapter = PackedAdapter(pool, layout, torch.arange(layout.slots), torch.float32)
    matrices = make_matrices(torch.float32)
    matrices[1]["o_proj", 1] = matrices[1]["o_proj", 1].t()
    with pytest.raises(ValueError, match="layer 1 o_proj matrix 1: the layout has"):
        adapter.write(matrices.__getitem__)
    del matrices[1]["o_proj", 1]
    with pytest.raises(ValueError, match="the adapter has nothing"):
        adapter.write(matrices.__getitem__)


def test_pool_shapes_that_cannot_hold_adapters_are_refused() -> None:
    good = torch.zeros((20, 2, 16))
    with pytest.raises(ValueError, match="contiguous"):
        UnifiedPool([good.transpose(1, 2)], [good], page_size=1)
    with pytest.raises(ValueError, match="HND"):
        UnifiedPool([torch.zeros(4, 2, 16, 16)], [good], page_size=1)
    with pytest.raises(ValueError, match="1 K and 0 V buffers"):
        UnifiedPool([good], [], page_size=1)
    with pytest.raises(ValueError, match="multiple of 16"):
        UnifiedPool([torch.zeros((20, 1, 3))], [good], page_size=1)
    with pytest.raises(ValueError, match="different KV shapes per layer"):
        UnifiedPool([good, torch.zeros((20, 4, 16))], [good, good], page_size=1)
    with pytest.raises(ValueError, match="number of slots"):
        UnifiedPool([good, torch.zeros((24, 2, 16))], [good, good], page_size=1)


def test_layout_for_another_pool_is_refused() -> None:
    layout = make_layout(make_pool(torch.float32, 1), torch.float32)
    with pytest.raises(ValueError, match="rows of"):
        PackedAdapter(make_pool(torch.bfloat16, 1), layout, torch.arange(layout.slots), torch.float32)
