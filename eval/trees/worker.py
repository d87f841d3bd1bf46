"""The measuring process: trees of one system in all sizes, requests on demand.

The workload, equal for all systems and sizes: 64 adapters; background prompts of 32 tokens, ten of which
share their first half; and per measured request a cached chat of four nodes (128, 128, 128, 256 tokens), of
which the request shares 512 tokens, so that its match ends in the middle of the fourth node and splits it.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import time
from array import array
from dataclasses import dataclass
from multiprocessing.connection import Connection
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
        allocator.freed = allocator.pieces = 0
        started = time.perf_counter()
        freed = grown.system.evict(EVICT_SLOTS)
        seconds = time.perf_counter() - started
        if freed == 0:
            break
        if not EVICT_SLOTS <= freed == allocator.freed:
            raise AssertionError(f"{freed} slots evicted, {allocator.freed} freed, {EVICT_SLOTS} wanted")
        samples.append(seconds / allocator.pieces)
    return samples


def grow_all(name: str, page_size: int, sizes: list[int], requests: int) -> dict[int, Grown]:
    """Trees of all sizes. Freezes them, as SGLang does after warm-up: the collector does not walk trees."""
    gc.unfreeze()
    gc.collect()
    grown = {size: grow(name, page_size, size, requests) for size in sizes}
    process.freeze()
    return grown


def serve(pipe: Connection, name: str, sizes: list[int], requests: int) -> None:
    """Process entry point: answers ``(what, size, count)`` until ``None`` comes.

    ``build`` (size: page size) replaces all trees and answers ``""`` or why it could not; ``request`` and
    ``evict`` answer samples in seconds.
    """
    grown: dict[int, Grown] = {}
    with contextlib.suppress(EOFError):
        while (order := pipe.recv()) is not None:
            what, size, count = order
            if what == "request":
                pipe.send([measure_request(grown[size]) for _ in range(count)])
            elif what == "evict":
                pipe.send(measure_eviction(grown[size], count))
            else:
                grown = {}
                try:
                    grown = grow_all(name, size, sizes, requests)
                except Exception as error:
                    pipe.send(f"{type(error).__name__}: {error}".splitlines()[0])
                else:
                    pipe.send("")
