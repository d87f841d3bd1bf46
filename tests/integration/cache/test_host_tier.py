"""The cache on two tiers, white-box: real pools and transfers, no model. Links are slow, so copies are late."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.mem_cache.base_prefix_cache import EvictParams
from support.cache_harness import Harness

from elora_sglang.core.trace import replay
from elora_sglang.runtime.transfers import engine as transfers

A, B, C = "a" * 32, "b" * 32, "c" * 32
ADAPTERS = {A: 64, B: 32, C: 48}
#: Slow enough that a copy of a hundred slots takes milliseconds.
GBPS = 0.002


@pytest.fixture(params=[1, 16])
def page(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def settle(harness: Harness) -> None:
    """Tick until no copy is in flight."""
    quiet = 0
    for _ in range(100_000):
        harness.tick()
        quiet = 0 if harness.cache.driver.busy else quiet + 1
        if quiet == 3:
            return
    raise AssertionError("copies never end")


def clean(harness: Harness, running: list[Any] | None = None) -> None:
    assert harness.cache.auditor is not None
    harness.cache.auditor.require_clean(running or [])
    harness.cache.tree.check(lambda slots: slots.tolist())
    assert running or harness.balance() == 0


def fill(harness: Harness, count: int, length: int = 96) -> None:
    """Requests of many adapters that share nothing: what came before has to leave."""
    for i in range(count):
        harness.run([50_000 + 1000 * i + j for j in range(length)], (A, B, C, None)[i % 4])
        harness.tick()


def test_what_left_the_device_comes_back_from_the_host(page: int) -> None:
    harness = Harness(640, ADAPTERS, page_size=page, host=4096, gbps=GBPS)
    first = list(range(160))
    harness.run(first, A)
    settle(harness)
    fill(harness, 12)
    again = harness.request([*first, 1, 2, 3], A)
    harness.match(again)
    assert again.prefix_len + again.host_hit_length == 160
    assert again.host_hit_length > 0
    harness.admit(again)
    assert again.host_loaded_length > 0 and again.prefix_len == 160
    harness.finish(again)
    settle(harness)
    clean(harness)
    assert harness.cache.stats.load_backs > 0 and harness.cache.stats.demoted > 0


def test_a_waiting_request_finds_its_prefix_on_the_device(page: int) -> None:
    harness = Harness(640, ADAPTERS, page_size=page, host=4096)
    first = list(range(160))
    harness.run(first, A)
    settle(harness)
    fill(harness, 12)
    again = harness.enqueue(harness.request([*first, 1, 2, 3], A))
    settle(harness)
    harness.match(again)
    assert again.prefix_len == 160 and again.host_hit_length == 0
    harness.admit(again)
    assert again.host_hit_length > 0, "tokens that were fetched while it waited are host hits"
    harness.finish(again)
    settle(harness)
    clean(harness)
    assert harness.cache.stats.queue_prefetches > 0


def test_an_aborted_waiting_request_leaves_nothing(page: int) -> None:
    harness = Harness(640, ADAPTERS, page_size=page, host=4096, gbps=GBPS)
    harness.run(list(range(160)), A)
    settle(harness)
    fill(harness, 12)
    again = harness.enqueue(harness.request(list(range(170)), A))
    harness.tick()
    harness.abort(again)
    settle(harness)
    clean(harness)


def test_a_flush_forgets_both_tiers(page: int) -> None:
    harness = Harness(640, ADAPTERS, page_size=page, host=4096, gbps=GBPS)
    harness.run(list(range(160)), A)
    fill(harness, 12)
    harness.enqueue(harness.request(list(range(170)), A))
    harness.tick()
    harness.cache.reset()
    harness.allocator.clear()
    assert harness.tier is not None and harness.tier.host.available == 4096
    again = harness.request(list(range(170)), A)
    assert harness.match(again) == 0 and again.host_hit_length == 0
    fill(harness, 4)
    settle(harness)
    clean(harness)


def test_a_flush_forgets_an_adapter_that_was_loaded_a_moment_before(page: int) -> None:
    harness = Harness(640, dict(ADAPTERS), page_size=page, host=4096)
    settle(harness)
    for flush in (False, True):
        late = "e" * 31 + str(int(flush))
        harness.weights.sizes[late] = 32
        if flush:
            harness.cache.reset()
            harness.allocator.clear()
        settle(harness)
        node = harness.cache.adapters.node(late)
        assert node.host is (not flush) and node.resident is (not flush)
    harness.run(list(range(60)), late)
    settle(harness)
    clean(harness)


def test_the_saves_of_one_plan_travel_together(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(4096, ADAPTERS, page_size=page, host=4096)
    settle(harness)
    for i in range(6):
        harness.run([1000 * i + j for j in range(64)], A)
    counts, before = harness.cache.manager.counters, harness.cache.manager.counters()["backups"]
    started: list[int] = []
    save = harness.engine.save

    def note(transfer: int, *slots: Any) -> None:
        started.append(transfer)
        save(transfer, *slots)

    monkeypatch.setattr(harness.engine, "save", note)
    harness.tick()
    assert counts()["backups"] - before == 6 and len(started) == 1
    settle(harness)
    below = harness.cache.tree.walk(harness.cache.adapters.node(A))
    assert all(node.clean for node in below)
    clean(harness)


def test_a_copy_of_several_saves_that_cannot_start_undoes_all(
    page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(4096, ADAPTERS, page_size=page, host=4096)
    settle(harness)
    for i in range(6):
        harness.run([1000 * i + j for j in range(64)], A)
    used = harness.cache.tree.host_size

    def refuse(*_: Any) -> None:
        raise transfers.TransferError("no")

    with monkeypatch.context() as patch:
        patch.setattr(harness.engine, "save", refuse)
        harness.tick()
        assert harness.cache.tree.host_size == used and not harness.cache.driver.busy
        clean(harness)
    settle(harness)
    clean(harness)


def test_an_unloaded_adapter_leaves_both_tiers(page: int) -> None:
    harness = Harness(640, ADAPTERS, page_size=page, host=4096, gbps=GBPS)
    harness.run(list(range(160)), A)
    fill(harness, 6)
    settle(harness)
    del harness.weights.sizes[A]
    harness.cache.adapters.drop(A)
    settle(harness)
    assert all(node.key != A for node in harness.cache.tree.adapters())
    clean(harness)


def test_a_copy_that_raises_is_recomputed(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(640, ADAPTERS, page_size=page, host=4096)
    first = list(range(160))
    harness.run(first, A)
    settle(harness)
    fill(harness, 12)

    def refuse(*_: Any, **__: Any) -> None:
        raise transfers.TransferError("no")

    monkeypatch.setattr(harness.engine, "load", refuse)
    again = harness.request([*first, 1, 2, 3], A)
    harness.admit(again)
    assert again.host_loaded_length == 0 and again.prefix_len < 160
    harness.finish(again)
    settle(harness)
    assert harness.cache.stats.failed_transfers > 0
    clean(harness)


def test_a_full_host_drops_its_least_valuable(page: int) -> None:
    harness = Harness(640, ADAPTERS, page_size=page, host=640)
    for round in range(4):
        fill(harness, 16, 64 + 16 * round)
    settle(harness)
    clean(harness)
    assert harness.cache.stats.host_evicted > 0


def test_a_host_that_no_adapter_fits_into_holds_the_base_models_kv(page: int) -> None:
    harness = Harness(640, ADAPTERS, page_size=page, host=16)
    fill(harness, 16)
    harness.run(list(range(16)))
    settle(harness)
    clean(harness)
    held = [node for node in harness.cache.tree.walk() if node.host and node.size]
    assert sum(node.size for node in held) == 16 and all(node.adapter.key is None for node in held)


def test_host_slots_that_run_out_are_no_error(page: int, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(640, ADAPTERS, page_size=page, host=4096)
    assert harness.tier is not None
    monkeypatch.setattr(harness.tier.host, "alloc", lambda n: None)
    fill(harness, 16)
    settle(harness)
    clean(harness)
    assert harness.cache.tree.host_size == 0
    assert harness.cache.stats.load_backs == 0


@pytest.mark.parametrize("what", ["kv", "adapter"])
def test_a_planted_bad_copy_trips_the_auditor(what: str, page: int) -> None:
    harness = Harness(2048, ADAPTERS, page_size=page, host=4096)
    harness.run(list(range(160)), A)
    settle(harness)
    for _ in range(3):
        fill(harness, 4)
        settle(harness)
    clean(harness)
    tree = harness.cache.tree
    node = next(n for n in tree.walk() if n.kind == what and n.size and n.clean)
    assert harness.tier is not None
    harness.tier.host.byte_rows(1, 1)[node.host_payload[3], 2] ^= 1
    assert harness.cache.auditor is not None
    kinds = {fault.kind for fault in harness.cache.auditor.audit([])}
    assert kinds & {"copy-differs", "copy-changed"}, kinds


def test_two_waiting_requests_of_one_prefix(page: int) -> None:
    """The second ends inside what the first one's load brings, which has no slots yet when both are planned."""
    harness = Harness(640, ADAPTERS, page_size=page, host=4096, gbps=GBPS)
    harness.run(list(range(160)), A)
    settle(harness)
    fill(harness, 12)
    first = harness.enqueue(harness.request(list(range(170)), A))
    second = harness.enqueue(harness.request([*range(96), 7, 8, 9], A))
    settle(harness)
    for req in (second, first):
        harness.admit(req)
        harness.finish(req)
    settle(harness)
    clean(harness)


def test_a_load_that_fails_takes_those_along_that_build_on_it(
    page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = Harness(640, ADAPTERS, page_size=page, host=4096)
    harness.run(list(range(96)), A)
    harness.run(list(range(192)), A)
    settle(harness)
    fill(harness, 12)
    load, calls = harness.engine.load, []

    def refuse_first(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 1:
            raise transfers.TransferError("no")
        load(*args)

    monkeypatch.setattr(harness.engine, "load", refuse_first)
    waiting = [harness.enqueue(harness.request([*range(n), 5, 6], A)) for n in (96, 192)]
    settle(harness)
    assert len(calls) > 1
    for req in waiting:
        harness.admit(req)
        harness.finish(req)
    settle(harness)
    clean(harness)


def test_a_recorded_run_replays(page: int, tmp_path: Path) -> None:
    """Fresh managers fed the recorded events take the recorded actions."""
    trace = tmp_path / "trace.jsonl"
    settings = {"policy": "elora", "trace_out": str(trace)}
    harness = Harness(640, ADAPTERS, page_size=page, host=1280, gbps=GBPS, settings=settings)
    for turn in range(3):
        harness.run([*range(100), *range(1000, 1000 + 20 * turn)], A)
        fill(harness, 8)
        req = harness.enqueue(harness.request([*range(100), *range(1000, 1020 + 20 * turn)], A))
        harness.tick()
        harness.admit(req)
        harness.finish(req)
    settle(harness)
    for _ in range(12):
        harness.tick()
    result = replay(trace.read_text().splitlines())
    print(result)
    assert result.events > 200 and result.mismatch is None
    assert harness.cache.stats.load_backs > 0


@pytest.mark.parametrize("new_pass", [False, True])
def test_a_prefix_computed_while_it_was_on_its_way(page: int, new_pass: bool) -> None:
    """Its row is repointed to the tree's slots, whose bytes are late: the next batch waits for them, and also
    when another pass began before that.
    """
    harness = Harness(640, ADAPTERS, page_size=page, host=4096, gbps=0.0002)
    cache, first = harness.cache, list(range(160))
    harness.run(first, A)
    settle(harness)
    cache.evict(EvictParams(num_tokens=cache.evictable_size()))
    running = harness.request([*first, 1, 2], A)
    cache.driver.reserve = harness.size  # no room for its own load back
    harness.admit(running)
    cache.driver.reserve = 0
    assert running.prefix_len == 0
    waiting = harness.enqueue(harness.request([*first, 3], A))
    harness.tick(1)
    cache.checkpoint(running, up_to=len(running.full_untruncated_fill_ids))
    assert cache.driver.loading, "for the one that waits"
    if new_pass:
        cache.begin_pass(None)
        assert harness.tier is not None
        harness.tier.engine.fence(sorted(cache.fences._fenced))
    harness.grow(running, [4])  # compares all that it reads
    harness.abort(waiting)
    harness.finish(running)
    settle(harness)
    clean(harness)


@pytest.mark.parametrize(
    "policy", ["lru", "elora", "paper", "paper-literal", "lfu", "slru", "gdsf", "chameleon", "arc", "static"]
)
@pytest.mark.parametrize("seed", range(2))
def test_random_traffic_serves_the_right_bytes(policy: str, page: int, seed: int) -> None:
    """Random sessions, aborts, retractions, unloads, flushes and failing files: every prefix holds its KV."""
    rng = random.Random(seed)
    print(f"seed {seed}")
    harness = Harness(
        800, ADAPTERS, page_size=page, host=1600, gbps=GBPS if seed % 2 else 0, settings={"policy": policy}
    )
    sessions = [([rng.randrange(1 << 30) for _ in range(40)], rng.choice([A, B, C, None])) for _ in range(24)]
    waiting: list[Any] = []
    running: list[Any] = []
    for step in range(400):
        roll = rng.random()
        if roll < 0.45:
            tokens, adapter = rng.choice(sessions)
            waiting.append(harness.enqueue(harness.request([*tokens, rng.randrange(1 << 30)], adapter)))
        elif roll < 0.75 and waiting and len(running) < 4:
            req = waiting.pop(0)
            if harness.fits(req):
                harness.admit(req)
                running.append(req)
            else:
                waiting.insert(0, req)
        elif roll < 0.95 and running:
            req = running.pop(rng.randrange(len(running)))
            if rng.random() < 0.1:  # retracted
                harness.finish(req, checkpoint=False)
                waiting.append(harness.enqueue(harness.request(list(req.origin_input_ids), req.lora_id)))
            else:
                harness.finish(req)
                for index, (tokens, adapter) in enumerate(sessions):
                    if adapter == req.lora_id and list(req.origin_input_ids[: len(tokens)]) == tokens:
                        longer = list(req.origin_input_ids)
                        sessions[index] = (longer if len(longer) < 160 else tokens[:40], adapter)
        elif roll < 0.97 and waiting:
            harness.abort(waiting.pop(rng.randrange(len(waiting))))
        elif roll < 0.975 and not running:
            waiting = []
            harness.cache.reset()
            harness.allocator.clear()
        harness.tick(len(running))
        if step % 10 == 0:
            clean(harness, running)
    for req in running:
        harness.finish(req)
    for req in waiting:
        harness.abort(req)
    settle(harness)
    clean(harness)
    assert harness.cache.stats.load_backs > 0, harness.cache.stats
