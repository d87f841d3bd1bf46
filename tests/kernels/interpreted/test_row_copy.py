"""Transfers between pools by the copy kernel."""

from __future__ import annotations

import pytest
import torch

from elora_sglang.runtime.pool.views import UnifiedPool
from elora_sglang.runtime.transfers import row_copy
from elora_sglang.runtime.transfers.row_copy import ByKernel, RowCopy


def pool(slots: int, generator: torch.Generator) -> UnifiedPool:
    layers = [torch.randn(slots, 2, 8, generator=generator) for _ in range(6)]
    return UnifiedPool(layers[:3], layers[3:], page_size=1)


def test_a_layer_at_a_time() -> None:
    generator = torch.Generator().manual_seed(1)
    source, target = pool(40, generator), pool(30, generator)
    source_slots, target_slots = (torch.randperm(count, generator=generator)[:17] for count in (40, 30))
    before = [target.word_rows(layer, 0).clone() for layer in range(3)]
    plan = RowCopy(
        source, target, source_slots, target_slots, way=ByKernel(source_slots, target_slots, "cpu")
    )
    assert plan.how == "kernel/1"
    assert plan.copy_layer(1) == 2 * 17 and plan.same(1)
    assert torch.equal(target.word_rows(0, 0), before[0]) and not plan.same(2)
    kept = torch.ones(30, dtype=torch.bool)
    kept[target_slots] = False
    assert torch.equal(target.word_rows(1, 0)[kept], before[1][kept])


def test_scattered_slots_go_by_the_kernel_whatever_their_runs_have_in_common(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a GPU and pinned memory, which are made believe here: how a copy goes is decided without them."""
    monkeypatch.setattr(row_copy, "_on_gpu", lambda source, target: True)
    monkeypatch.setattr(row_copy, "_pinned", lambda source, target: True)
    generator = torch.Generator().manual_seed(2)
    source, target = pool(4000, generator), pool(4000, generator)
    every_other = torch.arange(0, 200, 2)
    assert RowCopy(source, target, every_other, every_other + 1).how == "kernel/1"
    few = torch.cat([torch.arange(first, first + 9) for first in (0, 100, 300)])
    assert RowCopy(source, target, few, few).how == "runs/1"
    monkeypatch.setattr(row_copy, "LONG_RUN", 64 * 16)  # 16 rows
    long = torch.cat([torch.arange(first, first + 20) for first in range(0, 3000, 100)])
    assert RowCopy(source, target, long, long).how == "runs/1"
    assert RowCopy(source, target, long[::2], long[::2]).how == "kernel/1"
