"""The prefix cache through SGLang's own sequence of calls, on real allocators, without a model."""

from __future__ import annotations

import random

import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from support import seeds
from support.cache_harness import Harness

A, B = "a" * 32, "b" * 32


@pytest.fixture(params=[1, 16], ids=["page1", "page16"])
def harness(request: pytest.FixtureRequest) -> Harness:
    return Harness(2048, {A: 64, B: 32}, page_size=request.param)


def aligned(harness: Harness, length: int) -> int:
    return length // harness.page_size * harness.page_size


def test_second_request_hits_the_first(harness: Harness) -> None:
    harness.run(list(range(100)), A)
    again = harness.request([*range(100), 7, 8], A)
    assert harness.match(again) == aligned(harness, 100)


@pytest.mark.parametrize("tokens", [[], [5]])
def test_a_miss_pins_the_adapter(harness: Harness, tokens: list[int]) -> None:
    """Empty and too-short keys return the adapter node, never the root: the lock must pin the weights."""
    req = harness.request(tokens, A)
    assert harness.match(req) == 0
    assert req.last_node is harness.cache.adapters.node(A)
    harness.cache.adapters.load(req.last_node)
    lock = harness.cache.lock(req.last_node)
    harness.cache.evict(EvictParams(num_tokens=10_000))
    assert A in harness.weights.resident
    harness.cache.unlock(lock)
    harness.cache.evict(EvictParams(num_tokens=10_000))
    assert A not in harness.weights.resident
    assert harness.balance() == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((A, {}), (B, {})),
        ((A, {}), (None, {})),
        ((A, {}), (None, {"extra_key": A})),  # stock's isolation hole: extra_key equal to an adapter id
        ((None, {"extra_key": A}), (A, {})),
        ((None, {"extra_key": "x"}), (None, {})),
        ((A, {"extra_key": "x"}), (A, {"extra_key": "y"})),
        ((A, {"cache_salt": "s"}), (A, {})),
        ((None, {"cache_salt": "s"}), (None, {"cache_salt": "t"})),
    ],
)
def test_namespaces_never_share(harness: Harness, first: tuple, second: tuple) -> None:
    harness.run(list(range(100)), first[0], **first[1])
    assert harness.match(harness.request(list(range(100)), second[0], **second[1])) == 0
    assert harness.match(harness.request([*range(100), 1], first[0], **first[1])) == aligned(harness, 100)


def test_kv_leaves_before_its_adapter(harness: Harness) -> None:
    harness.run(list(range(64)), A)
    node = harness.cache.tree.adapter(A)
    harness.cache.evict(EvictParams(num_tokens=1))
    assert node.resident and harness.cache.stats.kv_evictions == 1
    harness.cache.evict(EvictParams(num_tokens=10_000))
    assert not node.resident and harness.cache.stats.adapter_evictions == 1
    assert harness.balance() == 0


def test_answer_can_go_without_the_prompt(harness: Harness) -> None:
    req = harness.request(list(range(64)), A)
    harness.admit(req)
    harness.grow(req, list(range(500, 564)))
    harness.finish(req)
    harness.cache.evict(EvictParams(num_tokens=1))
    assert harness.match(harness.request([*range(64), *range(500, 564), 1], A)) == 64


def test_duplicates_are_freed_and_the_row_repointed(harness: Harness) -> None:
    first, second = (harness.request(list(range(200)), A) for _ in range(2))
    harness.admit(first)
    harness.admit(second)
    harness.cache.checkpoint(first, up_to=200)
    harness.cache.checkpoint(second, up_to=200)
    shared = aligned(harness, 200)
    rows = harness.rows.req_to_token
    assert torch.equal(rows[first.kv.req_pool_idx, :shared], rows[second.kv.req_pool_idx, :shared])
    harness.finish(first)
    harness.finish(second)
    assert harness.balance() == 0
    assert harness.cache.auditor.audit([]) == []


def test_a_checkpoint_may_run_one_past_the_known_tokens(harness: Harness) -> None:
    """Mixed chunks: the row already holds the slot of a token that is still being computed; it stays the request's."""
    req = harness.request(list(range(64)), A)
    harness.admit(req)
    harness.grow(req, [1])
    del req.full_untruncated_fill_ids[64:]
    harness.cache.checkpoint(req, up_to=65)
    assert req.kv.cache_protected_len == 64
    assert harness.cache.auditor.audit([req]) == []
    req.full_untruncated_fill_ids.append(1)
    harness.finish(req)
    assert harness.balance() == 0


def test_unload_while_running(harness: Harness) -> None:
    """The branch is gone for everybody else at once; the running request keeps its weights to its end."""
    harness.run(list(range(100)), A)
    running = harness.request(list(range(120)), A)
    harness.admit(running)
    assert running.prefix_len > 0
    harness.cache.adapters.drop(A)
    harness.cache.adapters.drop(A)
    assert A in harness.weights.resident
    harness.grow(running, [1, 2, 3])
    harness.cache.checkpoint(running, up_to=123)
    harness.finish(running)
    assert A not in harness.weights.resident
    assert harness.balance() == 0
    assert harness.match(harness.request([*range(100), 1], A)) == 0


def test_reset_forgets_everything_and_frees_nothing(harness: Harness) -> None:
    harness.run(list(range(100)), A)
    harness.cache.reset()
    harness.allocator.clear()
    assert harness.weights.resident == {}
    assert harness.balance() == 0
    harness.run(list(range(100)), A)
    assert harness.cache.auditor.audit([]) == []


def test_match_without_a_request_is_refused(harness: Harness) -> None:
    with pytest.raises(ValueError, match="cannot know its adapter"):
        harness.cache.match_prefix(MatchPrefixParams(key=RadixKey(harness.request([1], A).origin_input_ids)))


@pytest.mark.parametrize("page_size", [1, 16])
def test_touch_refreshes_recency_only(page_size: int) -> None:
    harness = Harness(2048, {A: 64, B: 32}, page_size=page_size, settings={"policy": "lru"})
    old, young = harness.request([*range(64), 1], A), harness.request([*range(1000, 1064), 1], A)
    harness.run(list(range(64)), A)
    harness.run(list(range(1000, 1064)), A)
    harness.cache.touch_prefix(RadixKey(old.origin_input_ids, old.extra_key))
    harness.cache.evict(EvictParams(num_tokens=1))
    assert harness.match(old) == 64
    assert harness.match(young) == 0


def test_random_traffic_leaks_nothing(harness: Harness) -> None:
    """Admissions, decoding, finishes, retractions and unloads in random order; audited all along."""
    rng = random.Random(seeds.draw())
    running: list = []
    for _ in range(400):
        action = rng.random()
        if action < 0.45 and len(running) < 4:
            start = rng.randrange(3) * 7
            tokens = [*range(start, start + rng.randrange(1, 80)), *(rng.randrange(50) for _ in range(9))]
            req = harness.request(tokens, rng.choice([A, B, None]))
            harness.admit(req)
            running.append(req)
        elif action < 0.7 and running:
            harness.grow(rng.choice(running), [rng.randrange(50) for _ in range(rng.randrange(1, 20))])
        elif action < 0.97 and running:
            req = running.pop(rng.randrange(len(running)))
            harness.finish(req, checkpoint=rng.random() < 0.8)
        elif not any(r.lora_id == A for r in running):
            harness.cache.adapters.drop(A)
        harness.cache.tree.check()
        assert harness.cache.auditor.audit(running) == []
    for req in running:
        harness.finish(req)
    assert harness.balance() == 0
    harness.cache.evict(EvictParams(num_tokens=10_000))
    assert harness.allocator.available_size() == harness.size
