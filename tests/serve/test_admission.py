"""Admission on a live server whose pool holds one large adapter at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed

import pytest
from support import live
from support.demo_paths import Demo

# Slots. `code` and `gardening` take about 1,200 each, so only one of them fits beside some KV.
POOL = 1536
LARGE = ("code", "gardening")


@pytest.fixture(scope="module")
def server(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.LiveServer]:
    flags = ("--max-total-tokens", str(POOL), "--max-running-requests", "16", "--elora-audit-interval", "10")
    with live.server(
        demo.model,
        "--elora",
        *flags,
        "--lora-paths",
        *demo.lora_paths(),
        log_dir=tmp_path_factory.mktemp("log"),
    ) as running:
        yield running
        assert running.alive(), running.tail()


def state(server: live.LiveServer) -> dict:
    return server.get("/server_info").json()["internal_states"][0]["elora"]


def ids(start: int, length: int = 20) -> list[int]:
    return [10 + (start * 37 + i * 11) % 1500 for i in range(length)]


def in_use(server: live.LiveServer) -> int:
    """Slots that running requests hold: their adapters, their prefixes and their own."""
    now = state(server)
    return POOL - now["free_slots"] - now["evictable_slots"]


def wait_until(condition: object, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "the expected state did not come"
        time.sleep(0.02)


def test_more_adapters_than_fit_all_get_answers(server: live.LiveServer, demo: Demo) -> None:
    """All sixteen at once: nothing waits for ever, no assertion, no batch holds more than fits."""
    names = [*demo.adapters, None]
    with ThreadPoolExecutor(len(names)) as pool:
        found = [
            pool.submit(server.generate, input_ids=ids(i), lora_path=name, max_new_tokens=12, timeout=120)
            for i, name in enumerate(names)
        ]
        for future in as_completed(found, timeout=180):
            assert len(future.result()["output_ids"]) == 12
    assert state(server)["done"]["adapter_evictions"] > 0
    # An idle server fetches adapters ahead, and what is on its way is protected until it has arrived.
    wait_until(lambda: state(server)["protected_slots"] == 0)
    wait_until(lambda: in_use(server) == 0)


def test_base_requests_overtake_one_that_waits_for_its_adapter(server: live.LiveServer) -> None:
    """While `code` runs there is no room for `gardening`; base requests behind it run all the same."""
    order: list[str] = []
    lock = threading.Lock()

    def ask(tag: str, adapter: str | None, tokens: int) -> None:
        server.generate(input_ids=ids(len(tag)), lora_path=adapter, max_new_tokens=tokens, timeout=180)
        with lock:
            order.append(tag)

    with ThreadPoolExecutor(8) as pool:
        running = pool.submit(ask, "holder", LARGE[0], 200)
        wait_until(lambda: state(server)["protected_slots"] > 1000)
        waiting = pool.submit(ask, "waiting", LARGE[1], 4)
        time.sleep(0.5)
        base = [pool.submit(ask, f"base{i}", None, 4) for i in range(4)]
        for future in (*base, waiting, running):
            future.result(timeout=180)
    assert set(order[:4]) == {"base0", "base1", "base2", "base3"}, order
    assert order.index("holder") < order.index("waiting"), order


def test_a_stream_of_base_requests_does_not_starve_an_adapter(server: live.LiveServer) -> None:
    """Base requests may overtake a bounded number of times; then the pool drains for the one that waits."""
    stop = threading.Event()

    def flood(worker: int) -> int:
        count = 0
        while not stop.is_set():
            server.generate(input_ids=ids(worker * 1000 + count, 40), max_new_tokens=24, timeout=120)
            count += 1
        return count

    with ThreadPoolExecutor(12) as pool:
        floods: list[Future[int]] = [pool.submit(flood, worker) for worker in range(10)]
        try:
            wait_until(lambda: in_use(server) > 300)
            answer = server.generate(input_ids=ids(5), lora_path=LARGE[0], max_new_tokens=4, timeout=120)
            assert len(answer["output_ids"]) == 4
        finally:
            stop.set()
        assert sum(future.result(timeout=120) for future in floods) > 10


def test_a_request_that_can_never_fit_is_told_so(server: live.LiveServer) -> None:
    """Its adapter and its prompt are larger than the pool together: an error at once, and nobody is blocked."""
    refused = server.post(
        "/generate",
        {
            "input_ids": ids(1, 600),
            "lora_path": LARGE[0],
            "sampling_params": {"temperature": 0, "max_new_tokens": 4},
        },
        timeout=60,
    )
    assert refused.status == 400, refused.text
    assert "cannot fit" in refused.text and str(POOL) in refused.text
    assert len(server.generate(input_ids=ids(2), lora_path="sql", max_new_tokens=4)["output_ids"]) == 4


def test_generation_is_capped_beside_the_adapter(server: live.LiveServer) -> None:
    """`max_new_tokens` beyond what fits beside the adapter is cut, as stock cuts it by the pool's size."""
    answer = server.generate(input_ids=ids(3), lora_path=LARGE[0], max_new_tokens=5000, timeout=180)
    assert 0 < len(answer["output_ids"]) < POOL - 1000
    assert answer["meta_info"]["finish_reason"]["type"] == "length"


def test_a_pinned_adapter_counts_before_its_first_use(server: live.LiveServer, demo: Demo) -> None:
    """Pinned but never used: requests are capped beside it all the same, so that its first use hangs nobody."""
    load = {"lora_name": "kept", "lora_path": str(demo.adapters["sql"]), "pinned": True}
    reply = server.post("/load_lora_adapter", load)
    assert reply.status == 200, reply.text
    with ThreadPoolExecutor(3) as pool:
        base = pool.submit(server.generate, input_ids=ids(6), max_new_tokens=5000, timeout=180)
        kept = pool.submit(server.generate, input_ids=ids(7), lora_path="kept", max_new_tokens=4, timeout=180)
        other = pool.submit(
            server.generate, input_ids=ids(8), lora_path="french", max_new_tokens=4, timeout=180
        )
        assert len(kept.result()["output_ids"]) == len(other.result()["output_ids"]) == 4
        assert len(base.result()["output_ids"]) < POOL - 250
    again = server.generate(input_ids=ids(9), max_new_tokens=5000, timeout=180)
    assert 0 < len(again["output_ids"]) < POOL - 250
    assert server.post("/unload_lora_adapter", {"lora_name": "kept"}).status == 200
