"""What a server says about itself under ``elora`` in ``/server_info``."""

from __future__ import annotations

import re

from support.cache_harness import Harness

from elora_sglang.integration.cache import state
from elora_sglang.runtime.swap_driver import CacheStats

A = "a" * 32


def harness() -> Harness:
    """One that has loaded, saved and evicted, on both tiers."""
    made = Harness(640, {A: 64}, host=1024)
    for number in range(12):
        made.run(list(range(number * 100, number * 100 + 96)), A)
        made.tick()
    return made


def test_decided_and_done_share_no_word() -> None:
    found = state.of(harness().cache)
    assert found["decided"]["backups"] > 0 < found["done"]["backed_up"]
    assert not set(found["decided"]) & set(found["done"])
    assert not (set(found["decided"]) | set(found["done"])) & set(found)


def test_sizes_add_up() -> None:
    made = harness()
    found = state.of(made.cache)
    assert found["evictable_slots"] + found["protected_slots"] + found["free_slots"] == made.size
    assert found["host_free_slots"] + found["host_used_by_tree"] == found["host_slots"] == 1024
    assert found["resident_adapters"] == [A] and found["audit_faults"] == 0
    assert state.of(Harness(640, {A: 64}).cache)["host_slots"] == 0


def test_every_word_is_explained() -> None:
    found = state.of(harness().cache)
    assert state.__doc__ is not None and CacheStats.__doc__ is not None
    table = set(re.findall(r"\w+", state.__doc__))
    engine = set(harness().engine.counters())
    audits = {name for name in found if name.startswith("audit")}
    assert not (set(found) | set(found["decided"])) - table - engine - audits
    assert not set(found["done"]) - set(re.findall(r"\w+", CacheStats.__doc__))
