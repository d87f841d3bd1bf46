"""What matching and updating the tree costs a query, in wall time on this machine."""

from __future__ import annotations

import random
import time
from array import array
from typing import Any

from elora_sglang.core.costs import Costs
from elora_sglang.core.manager import CacheManager
from elora_sglang.core.swapper import SwapSettings
from elora_sglang.core.tree.node import Node
from elora_sglang.eval.sim.unified import SlotCounts

#: Nodes of KV before the measurement; blocks of a prompt, half of which are cached; queries measured.
NODES, BLOCKS, QUERIES = 10_000, 16, 2_000
ADAPTERS = 100


def measure() -> dict[str, Any]:
    """Mean seconds of match, lock, insert, unlock with policy ``elora``; prompts of 16 blocks, half of them cached."""
    rng = random.Random(0)
    manager = CacheManager(1, 10**9, "elora", SlotCounts(), SwapSettings(host_slots=0), Costs.default(), None)
    adapters = [manager.register(f"a{number}", 10) for number in range(ADAPTERS)]
    for node in adapters:
        manager.make_resident(node, 10)
    known: list[tuple[Node, array[int]]] = []
    taken = 0.0
    for number in range(NODES // 2 + QUERIES):
        adapter = rng.choice(adapters)
        fresh = array("q", (rng.randrange(1 << 40) for _ in range(BLOCKS)))
        if known and rng.random() < 0.5:
            adapter, before = rng.choice(known)
            fresh = before[: BLOCKS // 2] + fresh[BLOCKS // 2 :]
        begun = time.perf_counter()
        match = manager.match(adapter, fresh)
        manager.lock(match.node)
        inserted = manager.insert(adapter, fresh, None, BLOCKS, BLOCKS)
        manager.lock(inserted.node)
        manager.unlock(match.node)
        manager.unlock(inserted.node)
        if number >= NODES // 2:
            taken += time.perf_counter() - begun
        known.append((adapter, fresh))
    return {"mean_s": taken / QUERIES, "nodes": manager.tree.counts()["kv"]}
