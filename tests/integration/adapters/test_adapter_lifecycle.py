"""Load, replace and unload against schedulers that answer when the test lets them: who waits for whom."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import (
    LoadLoRAAdapterFromTensorsReqInput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    UnloadLoRAAdapterReqInput,
)
from support.adapter_folders import CONFIG, Q_A, WEIGHTS_FILE, poison, set_config, write_adapter

from elora_sglang.integration.adapters import tokenizer_side as adapter_lifecycle
from elora_sglang.integration.adapters.tokenizer_side import STILL_RUNNING, AdapterLifecycle
from elora_sglang.runtime.adapters.names import NameFault
from elora_sglang.runtime.adapters.versions import is_version


class Schedulers:
    """Two ranks. Remembers what it was told; ``answers`` overrides the next replies, one list per message."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.answers: list[list[LoRAUpdateOutput]] = []

    async def __call__(self, request: Any) -> list[LoRAUpdateOutput]:
        self.told.append(request)
        await asyncio.sleep(0)
        return self.answers.pop(0) if self.answers else [LoRAUpdateOutput(success=True)] * 2

    def unloaded(self) -> list[str]:
        return [r.lora_id for r in self.told if isinstance(r, UnloadLoRAAdapterReqInput)]


@pytest.fixture
def lifecycle(monkeypatch: pytest.MonkeyPatch) -> AdapterLifecycle:
    bag = SimpleNamespace(lora_target_modules={"all"})
    monkeypatch.setattr(adapter_lifecycle, "get_lora", lambda: bag)
    monkeypatch.setattr(adapter_lifecycle, "get_parallel", lambda: SimpleNamespace(tp_size=2))
    manager = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=CONFIG, dtype=torch.float32),
        served_model_name="base",
        update_lora_adapter_communicator=Schedulers(),
    )
    return AdapterLifecycle(manager, [])


def told(lifecycle: AdapterLifecycle) -> Schedulers:
    schedulers: Schedulers = lifecycle.manager.update_lora_adapter_communicator
    return schedulers


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def folder_request(name: str, path: Path, pinned: bool = False) -> LoadLoRAAdapterReqInput:
    return LoadLoRAAdapterReqInput(lora_name=name, lora_path=str(path), pinned=pinned)


async def load(lifecycle: AdapterLifecycle, name: str, path: Path, pinned: bool = False) -> LoRAUpdateOutput:
    return await lifecycle.answer(lifecycle.load_folder(folder_request(name, path, pinned)))


async def unload(lifecycle: AdapterLifecycle, name: str) -> LoRAUpdateOutput:
    return await lifecycle.answer(lifecycle.unload(name))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_ids_name_content_and_load(lifecycle: AdapterLifecycle, tmp_path: Path) -> None:
    async def work() -> None:
        one, two = write_adapter(tmp_path / "1"), write_adapter(tmp_path / "2", seed=1)
        for name, path in (("a", one), ("b", two), ("c", one)):
            assert (await load(lifecycle, name, path)).success
        ids = {name: lifecycle.registry.get(name).lora_id for name in "abc"}
        assert len(set(ids.values())) == 3
        assert ids["a"].split("-")[0] == ids["c"].split("-")[0] != ids["b"].split("-")[0]
        assert [r.lora_id for r in told(lifecycle).told] == list(ids.values())

    run(work())


def test_the_same_content_again_is_nothing_new(lifecycle: AdapterLifecycle, tmp_path: Path) -> None:
    async def work() -> None:
        await load(lifecycle, "a", write_adapter(tmp_path / "1"))
        before = lifecycle.registry.get("a")
        again = await load(lifecycle, "a", write_adapter(tmp_path / "copy"))
        assert again.success and lifecycle.registry.get("a") is before and len(told(lifecycle).told) == 1
        assert (await load(lifecycle, "a", tmp_path / "copy", pinned=True)).success
        assert lifecycle.registry.get("a").pinned and lifecycle.registry.get("a").lora_id != before.lora_id

    run(work())


def test_replacing_a_name_in_use(lifecycle: AdapterLifecycle, tmp_path: Path) -> None:
    async def work() -> None:
        registry = lifecycle.registry
        await load(lifecycle, "a", write_adapter(tmp_path / "1"))
        old = await registry.acquire("a")
        result = await load(lifecycle, "a", write_adapter(tmp_path / "2", seed=1))
        assert result.success and result.loaded_adapters == {"a": str(tmp_path / "2")}
        new = await registry.acquire("a")
        assert new != old and registry.users(old) == 1
        await asyncio.sleep(0.01)
        assert told(lifecycle).unloaded() == []  # the running request keeps the old version
        await registry.release(old)
        await until(lambda: told(lifecycle).unloaded() == [old])
        # Back to the first content: a version of its own, whatever is left of the first load.
        await load(lifecycle, "a", tmp_path / "1")
        third = await registry.acquire("a")
        assert third not in (old, new) and third.split("-")[0] == old.split("-")[0]

    run(work())


def test_unload_waits_for_its_own_requests_and_blocks_nobody(
    lifecycle: AdapterLifecycle, tmp_path: Path
) -> None:
    async def work() -> None:
        registry = lifecycle.registry
        path = write_adapter(tmp_path / "1")
        for name in ("a", "b"):
            await load(lifecycle, name, path)
        held = await registry.acquire(["a", None, "a"])
        leaving = asyncio.create_task(unload(lifecycle, "a"))
        await asyncio.sleep(0.01)
        assert not leaving.done() and told(lifecycle).unloaded() == []
        for call in (
            registry.acquire("a"),
            registry.acquire([None, "a"]),
            registry.get_unregistered_loras({"a"}),
        ):
            with pytest.raises(NameFault, match="Unknown adapter 'a'; nearest loaded: b"):
                await call
        # Meanwhile: other requests, other operations, and the very name again.
        other = await registry.acquire("b")
        await registry.release(other)
        assert (await unload(lifecycle, "b")).success
        assert (await load(lifecycle, "c", path)).success
        assert (await load(lifecycle, "a", path)).success
        assert (await registry.acquire("a")) not in held
        assert not leaving.done()
        await registry.release([held[0], None])
        await asyncio.sleep(0.01)
        assert not leaving.done()
        await registry.release(held[2])
        result = await leaving
        assert result.success and result.loaded_adapters == {"c": str(path), "a": str(path)}
        assert told(lifecycle).unloaded() == [other, held[0]]

    run(work())


def test_unloading_what_is_not_loaded(lifecycle: AdapterLifecycle, tmp_path: Path) -> None:
    async def work() -> None:
        assert "no adapter is loaded" in (await unload(lifecycle, "a")).error_message
        await load(lifecycle, "sql", write_adapter(tmp_path))
        assert "nearest loaded: sql" in (await unload(lifecycle, "sqll")).error_message
        assert (await unload(lifecycle, "sql")).success
        assert not (await unload(lifecycle, "sql")).success

    run(work())


def test_a_version_still_in_a_batch_is_asked_for_again(
    lifecycle: AdapterLifecycle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_lifecycle, "RETRY_SECONDS", 0.001)

    async def work() -> None:
        await load(lifecycle, "a", write_adapter(tmp_path))
        busy = LoRAUpdateOutput(success=False, error_message=f"{STILL_RUNNING}: 1")
        told(lifecycle).answers = [[LoRAUpdateOutput(success=True), busy], [busy, busy]]
        assert (await unload(lifecycle, "a")).success
        assert len(told(lifecycle).unloaded()) == 3

    run(work())


def test_a_refused_load_changes_nothing(lifecycle: AdapterLifecycle, tmp_path: Path) -> None:
    async def work() -> None:
        await load(lifecycle, "a", write_adapter(tmp_path / "1"))
        kept = lifecycle.registry.get("a")
        poison(float("nan"))(write_adapter(tmp_path / "bad"))
        result = await load(lifecycle, "a", tmp_path / "bad")
        assert not result.success and f"{tmp_path / 'bad' / WEIGHTS_FILE}: " in result.error_message
        assert lifecycle.registry.get("a") is kept and len(told(lifecycle).told) == 1
        # One of two ranks refuses: the other gives it back, and the name stays where it was.
        no = LoRAUpdateOutput(success=False, error_message="no room")
        told(lifecycle).answers = [[LoRAUpdateOutput(success=True), no]]
        result = await load(lifecycle, "a", write_adapter(tmp_path / "2", seed=1))
        assert (result.success, result.error_message) == (False, "no room")
        assert lifecycle.registry.get("a") is kept
        assert told(lifecycle).unloaded() == [told(lifecycle).told[1].lora_id]
        for name in ("base", "default", "base:x", " a"):
            assert "adapter name" in (await load(lifecycle, name, tmp_path / "2")).error_message

    run(work())


def test_operations_on_one_name_keep_their_order(lifecycle: AdapterLifecycle, tmp_path: Path) -> None:
    async def work() -> None:
        paths = [write_adapter(tmp_path / str(i), seed=i) for i in range(6)]
        results = await asyncio.gather(*(load(lifecycle, "a", path) for path in paths))
        assert all(r.success for r in results)
        assert lifecycle.registry.get("a").lora_path == str(paths[-1])
        await until(lambda: len(told(lifecycle).unloaded()) == 5)
        assert lifecycle.registry.get("a").lora_id not in told(lifecycle).unloaded()

    run(work())


def tensor_request(folder: Path, name: str = "a", **fields: Any) -> LoadLoRAAdapterFromTensorsReqInput:
    return LoadLoRAAdapterFromTensorsReqInput(
        lora_name=name,
        config_dict=json.loads((folder / "adapter_config.json").read_text()),
        serialized_named_tensors=[base64.b64encode(save(load_file(folder / WEIGHTS_FILE)))],
        **fields,
    )


def test_tensors_are_the_same_content_as_the_folder(lifecycle: AdapterLifecycle, tmp_path: Path) -> None:
    async def work() -> None:
        folder = write_adapter(tmp_path)
        request = tensor_request(folder)
        result = await lifecycle.answer(lifecycle.load_tensors(request, same_process=False))
        assert result.success and result.loaded_adapters == {"a": "__tensor__"}
        assert len(request.serialized_named_tensors) == 2  # one per rank, safetensors whatever was sent
        first = lifecycle.registry.get("a")
        assert (await load(lifecycle, "a", folder)).success and lifecycle.registry.get("a") is first
        bad = tensor_request(folder, expected_checksums={Q_A: "0" * 64})
        for request, words in (
            (bad, "checksum"),
            (tensor_request(folder, load_format="x"), "load_format"),
        ):
            result = await lifecycle.answer(lifecycle.load_tensors(request, same_process=False))
            assert not result.success and words in result.error_message

    run(work())


def test_a_failed_request_releases_nothing_it_never_had(lifecycle: AdapterLifecycle) -> None:
    run(lifecycle.registry.release(None))
    run(lifecycle.registry.release([None]))


def test_a_version_cannot_be_registered_twice(lifecycle: AdapterLifecycle) -> None:
    ref = LoRARef(lora_id="x-0", lora_name="a", lora_path="p", pinned=False)
    lifecycle.registry.put(ref)
    with pytest.raises(ValueError, match="already registered"):
        lifecycle.registry.put(ref)


def test_version_ids(tmp_path: Path) -> None:
    assert is_version("0" * 32 + "-7", "0" * 64) and not is_version("0" * 32 + "-7", "1" + "0" * 63)
    assert not is_version("7", "0" * 64)
    set_config(r=4)(write_adapter(tmp_path))
