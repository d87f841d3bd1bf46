"""The auditor is clean on a healthy pool, and every kind of planted fault trips it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.cache_harness import Harness

from elora_sglang.runtime.audit.device import AuditError


@pytest.fixture(params=[1, 16], ids=["page1", "page16"])
def scene(request: pytest.FixtureRequest) -> tuple[Harness, SimpleNamespace]:
    """A pool with cached KV of two adapters and the base model, and one running request."""
    harness = Harness(2048, {"a" * 32: 64, "b" * 32: 32}, page_size=request.param)
    harness.run(list(range(100)), "a" * 32)
    harness.run(list(range(50, 120)), "b" * 32)
    harness.run(list(range(90)), None)
    running = harness.request([*range(60), *range(900, 950)], "a" * 32)
    harness.admit(running)
    harness.grow(running, [1, 2, 3])
    return harness, running


def kinds(scene: tuple[Harness, SimpleNamespace]) -> set[str]:
    harness, running = scene
    assert harness.cache.auditor is not None
    return {fault.kind for fault in harness.cache.auditor.audit([running])}


def test_healthy_pool_is_clean(scene: tuple[Harness, SimpleNamespace]) -> None:
    assert kinds(scene) == set()
    harness, _ = scene
    assert harness.cache.auditor.counters() == {
        "audits": 1, "audit_faults": 0, "audit_adapters_compared": 2, "audit_copies_compared": 0,
    }  # fmt: skip


def test_lost_slot(scene: tuple[Harness, SimpleNamespace]) -> None:
    scene[0].allocator.alloc(scene[0].page_size)
    assert kinds(scene) == {"slot-lost"}


def test_slot_freed_while_cached(scene: tuple[Harness, SimpleNamespace]) -> None:
    harness, _ = scene
    node = next(iter(harness.cache.tree.kv_nodes()))
    harness.allocator.free_segment(node.payload[: harness.page_size], start_pos=0)
    assert kinds(scene) == {"slot-shared"}


def test_adapter_slots_given_away(scene: tuple[Harness, SimpleNamespace]) -> None:
    harness, _ = scene
    slots = harness.weights.resident["b" * 32]
    harness.allocator.free_segment(slots[: harness.page_size], start_pos=0)
    assert kinds(scene) == {"slot-shared"}


def test_overwritten_adapter(scene: tuple[Harness, SimpleNamespace]) -> None:
    harness, _ = scene
    harness.pool.byte_rows(1, 0)[harness.weights.resident["a" * 32][3], 5] ^= 1
    assert kinds(scene) == {"adapter-bytes"}


def test_kv_left_behind_by_its_adapter(scene: tuple[Harness, SimpleNamespace]) -> None:
    """The adapter's slots vanish behind the tree's back: its KV is invalid, whatever the tree thinks."""
    harness, _ = scene
    slots = harness.weights.resident.pop("b" * 32)
    harness.allocator.free_segment(slots, start_pos=0)
    assert {"adapter-unbacked", "kv-invalid"} <= kinds(scene)


def test_running_without_its_adapter(scene: tuple[Harness, SimpleNamespace]) -> None:
    scene[0].weights.resident.pop("a" * 32)
    assert "adapter-missing" in kinds(scene)


def test_kv_below_the_wrong_adapter(scene: tuple[Harness, SimpleNamespace]) -> None:
    """KV that one adapter computed, filed under another: what a namespace collision would do."""
    harness, _ = scene
    wrong = next(n for n in harness.cache.tree.kv_nodes() if harness.cache.tree.adapter_of(n).key == "b" * 32)
    harness.cache.auditor.record(wrong.payload, "a" * 32)
    assert kinds(scene) == {"kv-misplaced"}


def test_row_that_points_elsewhere(scene: tuple[Harness, SimpleNamespace]) -> None:
    harness, running = scene
    row = harness.rows.req_to_token[running.kv.req_pool_idx]
    row[0], row[1] = row[1].clone(), row[0].clone()
    assert kinds(scene) == {"row-differs"}


def test_adapter_moved(scene: tuple[Harness, SimpleNamespace]) -> None:
    harness, _ = scene
    node = harness.cache.tree.adapter("b" * 32)
    node.payload = torch.roll(node.payload, 1) + harness.page_size
    assert "adapter-moved" in kinds(scene)


def test_require_clean_names_the_fault(scene: tuple[Harness, SimpleNamespace]) -> None:
    harness, running = scene
    harness.allocator.alloc(harness.page_size)
    with pytest.raises(AuditError, match="slot-lost: "):
        harness.cache.auditor.require_clean([running])
