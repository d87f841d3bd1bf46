"""The byte layout: every row of every matrix has one place, nothing overlaps, little is wasted."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.layout_bytes import payload_bytes

from elora_sglang.runtime.pool.layout import (
    ALIGNMENT,
    AdapterLayout,
    ModuleShape,
    SliceShape,
    plan_adapter,
)


def fused(name: str, in_features: int, *parts: tuple[int, int]) -> ModuleShape:
    """A module from (width, LoRA rank) per part; parts of rank 0 are left out."""
    slices, offset = [], 0
    for width, rank in parts:
        if rank:
            slices.append(SliceShape(offset, width, rank))
        offset += width
    return ModuleShape(name, in_features, tuple(slices))


modules = st.lists(
    st.builds(
        fused,
        st.just("m"),
        st.integers(1, 200),
        st.tuples(st.integers(1, 150), st.integers(1, 20)),
        st.tuples(st.integers(1, 150), st.integers(0, 20)),
    ),
    max_size=5,
).map(lambda found: tuple(ModuleShape(f"m{i}", m.in_features, m.slices) for i, m in enumerate(found)))


def check(layout: AdapterLayout) -> None:
    """Assert everything the layout promises."""
    assert layout.slots % layout.page_size == 0
    for index, layer in enumerate(layout.layers):
        taken: dict[int, list[tuple[int, int]]] = {0: [], 1: []}
        rows: dict[tuple[str, int], list[int]] = {}
        for piece in layer.pieces:
            size = piece.rows * piece.cols * layout.itemsize
            assert piece.offset % ALIGNMENT == 0
            assert piece.offset + size <= layout.slots * layout.row_bytes[piece.stream]
            taken[piece.stream].append((piece.offset, piece.offset + size))
            rows.setdefault((piece.module, piece.matrix), []).extend(range(piece.row, piece.row + piece.rows))
            shape = layer.module(piece.module)
            assert shape is not None and shape.matrices()[piece.matrix][1] == piece.cols
        for spans in taken.values():
            spans.sort()
            assert all(end <= start for (_, end), (start, _) in pairwise(spans)), "overlap"
        for module in layer.modules:
            for matrix, (count, _) in enumerate(module.matrices()):
                assert rows.pop((module.name, matrix)) == list(range(count)), "each row once, in order"
        assert not rows
        cut = [
            key
            for key in {(p.module, p.matrix) for p in layer.pieces}
            if sum((p.module, p.matrix) == key for p in layer.pieces) > 1
        ]
        assert len(cut) <= 1, f"layer {index} cuts {cut}"


@settings(max_examples=300, deadline=None, print_blob=True)
@given(
    layers=st.lists(modules, min_size=1, max_size=3),
    itemsize=st.sampled_from([2, 4]),
    row_bytes=st.tuples(st.sampled_from([16, 64, 256, 1024]), st.sampled_from([16, 64, 256, 512])),
    page_size=st.sampled_from([1, 16]),
)
def test_any_shapes(
    layers: list[tuple[ModuleShape, ...]], itemsize: int, row_bytes: tuple[int, int], page_size: int
) -> None:
    layout = plan_adapter(layers, itemsize=itemsize, row_bytes=row_bytes, page_size=page_size)
    check(layout)
    assert layout.slots * sum(row_bytes) * len(layers) >= payload_bytes(layout)
    assert layout == plan_adapter(
        list(map(list, layers)), itemsize=itemsize, row_bytes=row_bytes, page_size=page_size
    )


def test_table_gives_the_address_of_every_row() -> None:
    layers = [(fused("qkv_proj", 64, (128, 8), (32, 0), (32, 8)), fused("o_proj", 128, (64, 3)))]
    layout = plan_adapter(layers, itemsize=4, row_bytes=(64, 64), page_size=1)
    table = layout.table(0)
    assert len(table) == len(layout.layers[0].pieces)
    for entry, piece in zip(table, layout.layers[0].pieces, strict=True):
        assert layout.layers[0].modules[entry[0]].name == piece.module
        assert entry[1:] == (piece.matrix, piece.row, piece.rows, piece.cols, piece.stream, piece.offset)


def test_slots_follow_the_largest_layer() -> None:
    small, large = (fused("o_proj", 64, (64, 4)),), (fused("o_proj", 64, (64, 32)),)
    one = plan_adapter([large], itemsize=2, row_bytes=(128, 128), page_size=1)
    both = plan_adapter([small, large, ()], itemsize=2, row_bytes=(128, 128), page_size=1)
    assert both.slots == one.slots == 32
    assert both.layers[2].pieces == ()


def test_a_matrix_is_cut_when_that_saves_slots_and_only_then() -> None:
    """q and v only: stacked A is two thirds of the bytes, whole matrices would waste a quarter."""
    attention = (fused("qkv_proj", 4096, (4096, 16), (1024, 0), (1024, 16)),)
    layout = plan_adapter([attention], itemsize=2, row_bytes=(2048, 2048), page_size=1)
    assert layout.slots == 104  # = bytes / 4096, nothing wasted; whole matrices would need 128
    check(layout)
    even = plan_adapter([(fused("o_proj", 64, (64, 8)),)], itemsize=2, row_bytes=(128, 128), page_size=1)
    assert [p.rows for p in even.layers[0].pieces] == [8, 8], "already balanced: nothing to cut"


def test_missing_parts_take_no_bytes() -> None:
    full = plan_adapter(
        [(fused("qkv_proj", 64, (64, 8), (32, 8), (32, 8)),)], itemsize=2, row_bytes=(64, 64), page_size=1
    )
    two = plan_adapter(
        [(fused("qkv_proj", 64, (64, 8), (32, 0), (32, 8)),)], itemsize=2, row_bytes=(64, 64), page_size=1
    )
    assert payload_bytes(full) - payload_bytes(two) == 2 * 8 * (64 + 32)


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_shards_of_one_adapter_need_the_same_slots(tp_size: int) -> None:
    """The layout depends on shapes alone, and SGLang gives every tp rank the same shapes."""
    per_rank = {
        plan_adapter(
            [
                (
                    fused(
                        "qkv_proj", 4096, (4096 // tp_size, 16), (1024 // tp_size, 16), (1024 // tp_size, 16)
                    ),
                    fused("down_proj", 14336 // tp_size, (4096, 16)),
                )
            ],
            itemsize=2,
            row_bytes=(2048 // tp_size,) * 2,
            page_size=16,
        ).slots
        for _ in range(tp_size)
    }
    assert len(per_rank) == 1


@pytest.mark.parametrize(
    ("layers", "sizes", "message"),
    [
        ([()], {"itemsize": 0, "row_bytes": (16, 16), "page_size": 1}, "sizes must be positive"),
        ([()], {"itemsize": 2, "row_bytes": (16, 0), "page_size": 1}, "sizes must be positive"),
        ([(fused("a", 0, (4, 4)),)], {"itemsize": 2, "row_bytes": (16, 16), "page_size": 1}, "layer 0 a"),
        (
            [(fused("a", 4, (4, 4)), fused("a", 4, (4, 4)))],
            {"itemsize": 2, "row_bytes": (16, 16), "page_size": 1},
            "names a module twice",
        ),
    ],
)
def test_impossible_shapes_are_refused(layers: list, sizes: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        plan_adapter(layers, **sizes)
