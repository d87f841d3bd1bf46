"""Slot payloads: values, order, and that no result shares memory with its source."""

from __future__ import annotations

import pytest
import torch

from elora_sglang.runtime.pool.slots import SlotPayloads

OPS = SlotPayloads()


def test_split_then_join_gives_the_payload_back() -> None:
    slots = torch.tensor([7, 3, 11, 2, 9], dtype=torch.int64)
    for at in range(1, 5):
        head, tail = OPS.split(slots, at)
        assert head.tolist() == slots[:at].tolist() and tail.tolist() == slots[at:].tolist()
        joined = OPS.join([head, tail])
        assert joined.dtype == torch.int64 and torch.equal(joined, slots)


def test_results_own_their_memory() -> None:
    row = torch.arange(4096)
    part = OPS.slice(row, 16, 32)
    assert part.untyped_storage().nbytes() == 16 * row.element_size()
    row.zero_()
    assert part.tolist() == list(range(16, 32))


def test_out_of_range_is_an_error_not_a_shorter_payload() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        OPS.slice(torch.arange(4), 2, 6)


def test_one_payload_joins_to_itself() -> None:
    only = torch.arange(3)
    assert OPS.join([only]) is only
