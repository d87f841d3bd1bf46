"""Row copies in one Triton launch: a program moves a few slots' rows of one stream of one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from elora_sglang.kernels.page_copy.rows import Rows


@dataclass(frozen=True)
class Config:
    """``slots``: of a program, a power of two. ``words``: 8-byte words of a row at a time. ``warps``: of a program."""

    slots: int = 4
    words: int = 256
    warps: int = 4


@triton.jit(do_not_specialize=["count", "first_layer"])
def _copy(
    source, target, sources, targets, source_slots, target_slots, count, first_layer,
    K_WORDS: tl.constexpr, V_WORDS: tl.constexpr, SLOTS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    ok = number < count
    source_slot = tl.load(source_slots + number, mask=ok, other=0).to(tl.int64)
    target_slot = tl.load(target_slots + number, mask=ok, other=0).to(tl.int64)
    stream = tl.program_id(1)
    place = (first_layer + tl.program_id(2)) * 2 + stream
    words = K_WORDS if K_WORDS == V_WORDS else tl.where(stream == 0, K_WORDS, V_WORDS)
    # Rows are multiples of 16 bytes: two words in one load.
    source_row = tl.multiple_of(tl.load(sources + place) + source_slot * words, 2)
    target_row = tl.multiple_of(tl.load(targets + place) + target_slot * words, 2)
    for start in range(0, words, WORDS):
        word = start + tl.arange(0, WORDS)
        inside = ok[:, None] & (word < words)[None, :]
        values = tl.load(source + source_row[:, None] + word[None, :], mask=inside, other=0)
        tl.store(target + target_row[:, None] + word[None, :], values, mask=inside)


def copy_rows(
    source: Rows,
    target: Rows,
    source_slots: torch.Tensor,
    target_slots: torch.Tensor,
    layers: range,
    config: Config | None = None,
) -> None:
    """As the reference, asynchronous on the current stream; ``layers`` without gaps."""
    if source.words != target.words:
        raise ValueError(f"rows of {source.words} words do not fit rows of {target.words}")
    if layers.step != 1:
        raise ValueError("layers without gaps are needed")
    count = len(source_slots)
    if not count or not len(layers):
        return
    config = config or Config()
    grid = (triton.cdiv(count, config.slots), 2, len(layers))
    _copy[grid](
        source.base, target.base, source.places, target.places, source_slots, target_slots, count, layers.start,
        K_WORDS=source.words[0], V_WORDS=source.words[1], SLOTS=config.slots, WORDS=config.words,
        num_warps=config.warps,
    )  # fmt: skip
