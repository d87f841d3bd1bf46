"""The measuring process: trees of one system in all sizes, requests on demand.

The workload, equal for all systems and sizes: 64 adapters; background prompts of 32 tokens, ten of which
share their first half; and per measured request a cached chat of four nodes (128, 128, 128, 256 tokens), of
which the request shares 512 tokens, so that its match ends in the middle of the fourth node and splits it.
"""

from __future__ import annotations

import gc
import itertools
import time
from array import array
from dataclasses import dataclass
from typing import Any

from elora_sglang.eval.trees import caches, process

REQUEST_TOKENS = 1024
SHARED_TOKENS = 512
CHAT_ENDS = (128, 256, 384, 640)
ADAPTERS = [f"adapter-{number:02}" for number in range(64)]
SHARING = 10
HALF = 16  # tokens in a background node; a whole page at both page sizes
EVICT_SLOTS = 512
EVICT_SECONDS = 2.0


@dataclass
class Grown:
    """One tree of a given size and the requests that will be measured on it."""

    system: Any
    requests: list[tuple[str, array[int]]]
    slots: Any


def grow(name: str, page_size: int, nodes: int, requests: int) -> Grown:
    """Build a tree of about ``nodes`` KV nodes, ready for ``requests`` measured ones.

    Raises ``ValueError`` if the chats alone need more nodes than that.
    """
    import torch

    torch.set_num_threads(1)
    background = nodes - len(CHAT_ENDS) * requests
    if background < 0:
        raise ValueError(f"{requests} requests need at least {len(CHAT_ENDS) * requests} nodes, not {nodes}")
    system = caches.build(name, page_size)
    for adapter in ADAPTERS:
        system.register(adapter)
    slots, unused = torch.arange(REQUEST_TOKENS), itertools.count()

    def fresh(count: int) -> array[int]:
        """Tokens that nobody used before."""
        return array("q", itertools.islice(unused, count))

    pending: list[tuple[str, array[int]]] = []
    every = max(background // max(requests, 1), 1)
    made = 0
    head = fresh(HALF)
    while made < background or len(pending) < requests:
        if made < background:
            group, member = divmod(made, SHARING + 1)
            if member == 0:
                head = fresh(HALF)
            else:
                system.insert(ADAPTERS[group % len(ADAPTERS)], head + fresh(HALF), slots[: 2 * HALF])
            made += 1
        if len(pending) < requests and (made >= background or made % every == 0):
            adapter, chat = ADAPTERS[len(pending) % len(ADAPTERS)], fresh(CHAT_ENDS[-1])
            for end in CHAT_ENDS:
                system.insert(adapter, chat[:end], slots[:end])
            pending.append((adapter, chat[:SHARED_TOKENS] + fresh(REQUEST_TOKENS - SHARED_TOKENS)))
    return Grown(system, pending, slots)


def measure_request(grown: Grown) -> float:
    """Seconds for match + lock + prefix slots + insert + re-lock + all slots + unlock of the next request."""
    adapter, tokens = grown.requests.pop()
    system, slots = grown.system, grown.slots
    cache = system.cache
    started = time.perf_counter()
    matched, node = system.match(adapter, tokens)
    lock = cache.lock(node)
    prefix = cache.path_device_indices(node)
    end = system.insert(adapter, tokens, slots)
    relock = cache.lock(end)
    cache.unlock(lock)
    row = cache.path_device_indices(end)
    cache.unlock(relock)
    seconds = time.perf_counter() - started
    if (matched, len(prefix), len(row)) != (SHARED_TOKENS, SHARED_TOKENS, REQUEST_TOKENS):
        raise AssertionError(f"wrong answers: {matched} matched, {len(prefix)} and {len(row)} slots")
    return seconds


def measure_eviction(grown: Grown, calls: int) -> list[float]:
    """Seconds a victim in each of at most ``calls`` calls that make room for 512 slots; stops after 2 s."""
    allocator = grown.system.cache.token_to_kv_pool_allocator
    samples: list[float] = []
    stop = time.perf_counter() + EVICT_SECONDS
    while len(samples) < calls and (len(samples) < 2 or time.perf_counter() < stop):
        allocator.freed, before = 0, grown.system.victims
        started = time.perf_counter()
        freed = grown.system.evict(EVICT_SLOTS)
        seconds = time.perf_counter() - started
        if freed == 0:
            break
        if not EVICT_SLOTS <= freed == allocator.freed:
            raise AssertionError(f"{freed} slots evicted, {allocator.freed} freed, {EVICT_SLOTS} wanted")
        samples.append(seconds / (grown.system.victims - before))
    return samples


#: The trees of this process, by size.
_grown: dict[int, Grown] = {}


def build(name: str, page_size: int, sizes: list[int], requests: int) -> str:
    """Grow trees of all sizes in place of those that are there; returns an empty text.

    Freezes them, as SGLang does after warm-up: the collector does not walk trees.
    """
    _grown.clear()
    gc.unfreeze()
    gc.collect()
    _grown.update((size, grow(name, page_size, size, requests)) for size in sizes)
    process.freeze()
    return ""


def request(size: int, count: int) -> list[float]:
    """Seconds of the next ``count`` requests on the tree of this size."""
    return [measure_request(_grown[size]) for _ in range(count)]


def evict(size: int, count: int) -> list[float]:
    """:func:`measure_eviction` on the tree of this size."""
    return measure_eviction(_grown[size], count)
