"""The table of slot counts in docs/byte-layout.md is what the code computes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from support.layout_bytes import payload_bytes, pool_bytes

from elora_sglang.runtime.pool.layout import CUT_WORTH, AdapterLayout, ModuleShape, SliceShape, plan_adapter

DOC = Path(__file__).parents[3] / "docs" / "byte-layout.md"


@dataclass(frozen=True)
class Model:
    """Sizes of a dense decoder, all tp ranks together."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    layers: int


LLAMA_3_8B = Model("Llama-3-8B", 4096, 32, 8, 128, 14336, 32)
LLAMA_2_7B = Model("Llama-2-7B", 4096, 32, 32, 128, 11008, 32)
LLAMA_3_70B = Model("Llama-3-70B", 8192, 64, 8, 128, 28672, 80)

ALL_LINEAR = "all linear"
QKVO = "q, k, v, o"
QV = "q, v"

#: (model, adapted modules, LoRA rank, bytes per weight, bytes per KV element, page size, tp size)
ROWS: list[tuple[Model, str, int, int, int, int, int]] = [
    (LLAMA_3_8B, ALL_LINEAR, 16, 2, 2, 1, 1),
    (LLAMA_3_8B, ALL_LINEAR, 16, 2, 2, 16, 1),
    (LLAMA_3_8B, ALL_LINEAR, 64, 2, 2, 16, 1),
    (LLAMA_3_8B, ALL_LINEAR, 16, 2, 1, 16, 1),
    (LLAMA_3_8B, QKVO, 16, 2, 2, 1, 1),
    (LLAMA_3_8B, QV, 16, 2, 2, 1, 1),
    (LLAMA_3_8B, QV, 8, 2, 2, 16, 1),
    (LLAMA_2_7B, ALL_LINEAR, 16, 2, 2, 1, 1),
    (LLAMA_2_7B, QV, 16, 2, 2, 1, 1),
    (LLAMA_3_70B, ALL_LINEAR, 32, 2, 2, 16, 1),
    (LLAMA_3_70B, ALL_LINEAR, 32, 2, 2, 16, 4),
    (LLAMA_3_70B, ALL_LINEAR, 32, 2, 2, 16, 8),
]


def layout_of(
    model: Model, targets: str, rank: int, weight: int, kv: int, page_size: int, tp: int
) -> AdapterLayout:
    """Layout of one tp rank's shard of an adapter with one LoRA rank throughout."""
    q, own_kv = model.heads * model.head_dim // tp, max(1, model.kv_heads // tp) * model.head_dim
    qkv = {ALL_LINEAR: (q, own_kv, own_kv), QKVO: (q, own_kv, own_kv), QV: (q, 0, own_kv)}[targets]
    offsets = (0, q, q + own_kv)
    slices = tuple(SliceShape(o, w, rank) for o, w in zip(offsets, qkv, strict=True) if w)
    modules = [ModuleShape("qkv_proj", model.hidden, slices)]
    if targets != QV:
        modules.append(ModuleShape("o_proj", q, (SliceShape(0, model.hidden, rank),)))
    if targets == ALL_LINEAR:
        inner = model.inner // tp
        gate_up = (SliceShape(0, inner, rank), SliceShape(inner, inner, rank))
        modules.append(ModuleShape("gate_up_proj", model.hidden, gate_up))
        modules.append(ModuleShape("down_proj", inner, (SliceShape(0, model.hidden, rank),)))
    row = own_kv * kv
    return plan_adapter([modules] * model.layers, itemsize=weight, row_bytes=(row, row), page_size=page_size)


def table() -> str:
    lines = [
        "| model | adapted | LoRA rank | KV element | page | tp | slots | MiB per tp rank | waste |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model, targets, rank, weight, kv, page_size, tp in ROWS:
        layout = layout_of(model, targets, rank, weight, kv, page_size, tp)
        waste = 1 - payload_bytes(layout) / pool_bytes(layout)
        lines.append(
            f"| {model.name} | {targets} | {rank} | {kv} B | {page_size} | {tp} | {layout.slots} "
            f"| {pool_bytes(layout) / 2**20:.1f} | {waste:.1%} |"
        )
    return "\n".join(lines)


def test_documented_table_is_current() -> None:
    expected = table()
    assert expected in DOC.read_text(), f"docs/byte-layout.md must contain:\n{expected}"


def test_little_is_wasted_beyond_the_last_page() -> None:
    for row in ROWS:
        layout = layout_of(*row)
        full = pool_bytes(layout) * (layout.slots - layout.page_size) // layout.slots
        assert payload_bytes(layout) >= (1 - CUT_WORTH) * full, row
