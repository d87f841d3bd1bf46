"""Adapters over HTTP, while serving: broken ones, unload, replace, tensors, pinned. One live server.

The reference of every answer is the same adapter under a name that no test touches.
"""

from __future__ import annotations

import pickle
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save
from support import live
from support.demo_paths import Demo
from support.lifecycle_world import (
    FAULTS,
    KEPT,
    POOL,
    PROMPT,
    WEIGHTS_FILE,
    Stream,
    answer,
    cached,
    copy_adapter,
    load,
    nothing_left,
    pressure,
    send_tensors,
    state,
    unload,
    until,
)


@pytest.fixture(scope="module")
def server(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[live.LiveServer]:
    flags = ("--elora", "--dtype", "float32", "--max-running-requests", "8", "--max-total-tokens", str(POOL))
    with live.server(
        demo.model,
        *flags,
        *("--stream-interval", "1", "--lora-paths", *demo.lora_paths(*KEPT)),
        log_dir=tmp_path_factory.mktemp("lifecycle"),
    ) as running:
        yield running


# -- broken adapters ------------------------------------------------------------------------------


def test_a_broken_adapter_is_a_4xx_with_file_and_fault(
    server: live.LiveServer, demo: Demo, tmp_path: Path
) -> None:
    before = answer(server, "sql")
    for number, (breaks, file, words) in enumerate(FAULTS.values()):
        folder = copy_adapter(demo, "sql", tmp_path / str(number))
        breaks(folder)
        for name in ("broken", "sql"):  # as a new name, and over a name in use
            reply = load(server, name, folder)
            assert 400 <= reply.status < 500
            message = reply.json()["error_message"]
            assert str(folder / file) in message and words in message
    assert load(server, "broken", tmp_path / "absent").status == 400
    assert server.alive() and answer(server, "sql") == before
    assert server.post("/generate", {"text": "x", "lora_path": "broken"}).status == 404


def test_the_good_copy_loads(server: live.LiveServer, demo: Demo, tmp_path: Path) -> None:
    folder = copy_adapter(demo, "sql", tmp_path / "good")
    assert load(server, "good", folder).status == 200
    assert answer(server, "good") == answer(server, "sql")
    assert unload(server, "good").status == 200


# -- unload ---------------------------------------------------------------------------------------


def test_unload_is_final_until_the_name_is_loaded_again(server: live.LiveServer, demo: Demo) -> None:
    expected = answer(server, "sql")
    assert load(server, "gone", demo.adapters["sql"]).status == 200
    assert answer(server, "gone") == expected and cached(server, "gone") > 0
    slots = state(server)["free_slots"]
    assert unload(server, "gone").status == 200
    assert state(server)["free_slots"] > slots  # weights and KV have left at once
    names = [card["id"] for card in server.get("/v1/models").json()["data"]]
    assert "gone" not in names and set(KEPT) <= set(names)
    for _ in range(2):  # stock reloads it on the first of these
        reply = server.post("/generate", {"text": PROMPT, "lora_path": "gone"})
        assert reply.status == 404 and "Unknown adapter 'gone'" in reply.text
    assert unload(server, "gone").status == 400
    assert load(server, "gone", demo.adapters["sql"]).status == 200
    first = server.generate(PROMPT, lora_path="gone", max_new_tokens=24)
    assert first["output_ids"] == expected and first["meta_info"]["cached_tokens"] == 0
    assert unload(server, "gone").status == 200


def test_unload_waits_for_its_requests_and_blocks_no_others(server: live.LiveServer, demo: Demo) -> None:
    expected = answer(server, "poetry", tokens=400)
    assert load(server, "busy", demo.adapters["poetry"]).status == 200
    stream = Stream(server, "busy", 400)
    stream.wait_for(3)
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(unload, server, "busy")
        until(lambda: server.post("/generate", {"text": "x", "lora_path": "busy"}).status == 404)
        # All of this happens while "busy" still runs and its unload still waits.
        assert answer(server, "sql", tokens=4) and answer(server, None, tokens=4)
        assert load(server, "other", demo.adapters["legal"]).status == 200
        assert answer(server, "other", tokens=4) == answer(server, "legal", tokens=4)
        assert unload(server, "other").status == 200
        assert load(server, "busy", demo.adapters["legal"]).status == 200  # the same name, already
        assert answer(server, "busy", tokens=4) == answer(server, "legal", tokens=4)
        assert stream.running and not leaving.done()
        assert stream.result() == expected
        assert leaving.result(60).status == 200
    assert unload(server, "busy").status == 200
    assert nothing_left(server)


def test_every_way_a_request_ends_lets_its_version_go(server: live.LiveServer, demo: Demo) -> None:
    """An unload that follows would wait for ever for a request that is not counted off."""
    few: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 3, "ignore_eos": True}
    requests: list[tuple[int, dict[str, Any]]] = [
        (200, {"text": [PROMPT] * 2, "lora_path": "end", "sampling_params": {**few, "n": 2}}),
        (200, {"text": [PROMPT] * 3, "lora_path": ["end", None, "sql"], "sampling_params": few}),
        (404, {"text": [PROMPT] * 2, "lora_path": ["end", "nobody"], "sampling_params": few}),
        (400, {"input_ids": [7] * (2 * POOL), "lora_path": "end", "sampling_params": few}),
        (400, {"text": PROMPT, "lora_path": "end", "sampling_params": {**few, "top_p": 7}}),
        (200, {"text": PROMPT, "lora_path": "end", "sampling_params": {**few, "regex": "[a-z]{3}"}}),
    ]
    for status, request in requests:
        assert load(server, "end", demo.adapters["news"]).status == 200
        assert server.post("/generate", request).status == status, request
        assert server.request("POST", "/unload_lora_adapter", {"lora_name": "end"}, timeout=30).status == 200
    assert load(server, "end", demo.adapters["news"]).status == 200
    stream = Stream(server, "end", 2000)
    stream.wait_for(2)
    stream.hang_up()
    assert server.request("POST", "/unload_lora_adapter", {"lora_name": "end"}, timeout=30).status == 200
    assert nothing_left(server)


# -- replace --------------------------------------------------------------------------------------


def test_replacing_a_name_in_use(server: live.LiveServer, demo: Demo) -> None:
    old, new = answer(server, "french", tokens=400), answer(server, "legal")
    assert old[:24] != new
    assert load(server, "name", demo.adapters["french"]).status == 200
    stream = Stream(server, "name", 400)
    stream.wait_for(3)
    assert load(server, "name", demo.adapters["legal"]).status == 200
    first = server.generate(PROMPT, lora_path="name", max_new_tokens=24)
    assert first["output_ids"] == new and first["meta_info"]["cached_tokens"] == 0
    assert stream.running, "the old version must still run, or this shows nothing"
    assert stream.result() == old
    until(lambda: server.log_text().count("has left") > 0)
    assert answer(server, "name") == new
    assert unload(server, "name").status == 200
    assert nothing_left(server)


def test_files_changed_in_place_are_another_version(
    server: live.LiveServer, demo: Demo, tmp_path: Path
) -> None:
    folder = copy_adapter(demo, "french", tmp_path / "adapter")
    assert load(server, "place", folder).status == 200
    assert answer(server, "place") == answer(server, "french") and cached(server, "place") > 0
    assert load(server, "place", folder).status == 200  # the same content: nothing happens
    assert cached(server, "place") > 0
    shutil.rmtree(folder)
    copy_adapter(demo, "legal", folder)
    assert answer(server, "place") == answer(server, "french")  # files alone change nothing
    assert load(server, "place", folder).status == 200
    first = server.generate(PROMPT, lora_path="place", max_new_tokens=24)
    assert first["meta_info"]["cached_tokens"] == 0 and first["output_ids"] == answer(server, "legal")
    assert unload(server, "place").status == 200


def test_a_storm_of_operations_never_mixes_weights(server: live.LiveServer, demo: Demo) -> None:
    """Every answer for a name that is replaced all the time is one of its two versions, whole."""
    versions = [answer(server, name, tokens=12) for name in ("french", "legal")]
    steady = answer(server, "sql", tokens=12)
    assert load(server, "storm", demo.adapters["french"]).status == 200
    stop = threading.Event()

    def change() -> int:
        count = 0
        while not stop.is_set():
            count += 1
            name = ("legal", "french")[count % 2]
            assert load(server, "storm", demo.adapters[name]).status == 200
            if count % 3 == 0:
                assert unload(server, "storm").status == 200
                assert load(server, "storm", demo.adapters[name]).status == 200
        return count

    def ask(number: int) -> tuple[int, list[int]]:
        name = "sql" if number % 4 == 0 else "storm"
        reply = server.post(
            "/generate",
            {
                "text": PROMPT,
                "lora_path": name,
                "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
            },
        )
        return reply.status, reply.json().get("output_ids", []) if reply.status == 200 else []

    with ThreadPoolExecutor(7) as pool:
        changes = pool.submit(change)
        replies = list(pool.map(ask, range(80)))
        stop.set()
        assert changes.result(60) > 5
    for number, (status, tokens) in enumerate(replies):
        if number % 4 == 0:
            assert tokens == steady
        else:
            assert (status, tokens) == (404, []) or tokens in versions
    seen = [tokens for _, tokens in replies]
    assert all(version in seen for version in versions)
    assert unload(server, "storm").status == 200
    assert nothing_left(server) and server.alive()


# -- tensors --------------------------------------------------------------------------------------


def test_load_from_tensors(server: live.LiveServer, demo: Demo) -> None:
    assert send_tensors(server, "sent", demo.adapters["french"]).status == 200
    assert answer(server, "sent") == answer(server, "french")
    assert send_tensors(server, "sent", demo.adapters["legal"]).status == 200
    assert answer(server, "sent") == answer(server, "legal")
    assert unload(server, "sent").status == 200
    assert server.post("/generate", {"text": "x", "lora_path": "sent"}).status == 404


class _Runs:
    def __reduce__(self) -> Any:
        return (print, ("elora-pickle-ran",))


def test_only_tensors_are_unpickled(server: live.LiveServer, demo: Demo) -> None:
    tensors = load_file(demo.adapters["french"] / WEIGHTS_FILE)
    assert send_tensors(server, "sent", demo.adapters["french"], pickle.dumps(tensors)).status == 200
    reply = send_tensors(server, "sent", demo.adapters["french"], pickle.dumps({"x": _Runs()}))
    assert reply.status == 400 and "only tensors are unpickled" in reply.json()["error_message"]
    assert "elora-pickle-ran" not in server.log_text()
    broken = dict(tensors)
    broken[min(broken)] = broken[min(broken)] * float("inf")
    reply = send_tensors(server, "sent", demo.adapters["french"], save(broken))
    assert reply.status == 400 and "NaN or infinite" in reply.json()["error_message"]
    assert answer(server, "sent") == answer(server, "french")
    assert unload(server, "sent").status == 200


# -- pinned ---------------------------------------------------------------------------------------


def test_pinned_adapters_stay_and_cannot_fill_the_pool(server: live.LiveServer, demo: Demo) -> None:
    pinned: list[str] = []
    refusal = ""
    for name, folder in demo.adapters.items():
        reply = load(server, f"pin-{name}", folder, pinned=True)
        if reply.status != 200:
            assert reply.status == 400
            refusal = reply.json()["error_message"]
            break
        pinned.append(f"pin-{name}")
    assert pinned and "may be pinned" in refusal, refusal
    expected = [answer(server, name, tokens=4) for name in pinned]
    assert answer(server, "poetry", tokens=4)
    loads = state(server)["done"]["adapter_loads"]
    pressure(server)
    assert [answer(server, name, tokens=4) for name in pinned] == expected
    assert state(server)["done"]["adapter_loads"] == loads, "a pinned adapter left"
    answer(server, "poetry", tokens=4)
    assert state(server)["done"]["adapter_loads"] == loads + 1, (
        "the pressure was none: an unpinned one stayed"
    )
    for name in pinned:
        assert unload(server, name).status == 200
    assert nothing_left(server)
