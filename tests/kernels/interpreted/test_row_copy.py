"""Transfers between pools by the copy kernel."""

from __future__ import annotations

import torch

from elora_sglang.runtime.pool import UnifiedPool
from elora_sglang.runtime.row_copy import RowCopy


def pool(slots: int, generator: torch.Generator) -> UnifiedPool:
    layers = [torch.randn(slots, 2, 8, generator=generator) for _ in range(6)]
    return UnifiedPool(layers[:3], layers[3:], page_size=1)


def test_a_layer_at_a_time() -> None:
    generator = torch.Generator().manual_seed(1)
    source, target = pool(40, generator), pool(30, generator)
    froms, tos = (torch.randperm(count, generator=generator)[:17] for count in (40, 30))
    before = [target.word_rows(layer, 0).clone() for layer in range(3)]
    plan = RowCopy(source, target, froms, tos, kernel=True)
    assert plan.how == "kernel/1"
    assert plan.copy_layer(1) == 2 * 17 and plan.same(1)
    assert torch.equal(target.word_rows(0, 0), before[0]) and not plan.same(2)
    kept = torch.ones(30, dtype=torch.bool)
    kept[tos] = False
    assert torch.equal(target.word_rows(1, 0)[kept], before[1][kept])
