"""Adapters on the host side: one copy, read in the background, checked again, and what happens to broken files."""

from __future__ import annotations

import gc
import json
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.lora.lora import LoRAAdapter
from sglang.srt.lora.lora_registry import LoRARef
from support.lora_world import Shape, World, make_world, random_adapter, scattered_slots

from elora_sglang.integration.weights import reader as adapter_reader
from elora_sglang.integration.weights.peft import normalize_weights
from elora_sglang.integration.weights.reader import NO_FILE
from elora_sglang.integration.weights.store import bound_waiting
from elora_sglang.runtime.adapters.files import AdapterError, read_folder
from elora_sglang.runtime.adapters.versions import version_id
from elora_sglang.runtime.pool.host import HostPool

SHAPE = Shape()
MODULES = ["q_proj", "v_proj", "o_proj", "up_proj"]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def normalised() -> Iterator[None]:
    original = LoRAAdapter._normalize_weights

    def hook(adapter: LoRAAdapter) -> None:
        # World.add puts its own hook around this one.
        if hasattr(adapter, "_elora_lora_ranks"):
            original(adapter)
        else:
            normalize_weights(original, adapter)

    with mock.patch.object(LoRAAdapter, "_normalize_weights", hook):
        yield


@pytest.fixture
def world() -> Iterator[World]:
    world = make_world(page_size=16)
    pool = world.pool
    pool.store.bind(HostPool(1024, pool.pool, pin=False))
    yield world
    pool.store.poll_reads(wait=True)


def add(world: World, folder: Path, seed: int = 1, *, file: bool = True) -> str:
    """An adapter in ``folder``, registered as SGLang does; returns its id."""
    config, tensors = random_adapter(SHAPE, MODULES, 8, seed=seed)
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    files = read_folder(folder)
    lora_id = version_id(files.version(), seed)
    world.add(lora_id, config, files.tensors)
    path = str(folder) if file else NO_FILE
    world.lora_manager.lora_refs[lora_id] = LoRARef(
        lora_id=lora_id, lora_name="sql", lora_path=path, pinned=False
    )
    return lora_id


def host_slots(world: World, lora_id: str) -> torch.Tensor:
    slots = world.pool.store.host.alloc(world.pool.slots_needed(lora_id))
    assert slots is not None
    return slots


def place(world: World, lora_id: str) -> torch.Tensor:
    slots = host_slots(world, lora_id)
    world.pool.store.read_into_host(lora_id, slots)
    return slots


def device_bytes(world: World, lora_id: str, seed: int = 3) -> torch.Tensor:
    """Load into scattered device slots, read back, drop."""
    world.pool.load(lora_id, scattered_slots(world.pool.slots_needed(lora_id), 4096, 16, seed))
    found = world.pool.read_bytes(lora_id)
    world.pool.drop(lora_id)
    return found


def test_every_source_gives_the_same_bytes_on_the_device(world: World, tmp_path: Path) -> None:
    store, lora_id = world.pool.store, add(world, tmp_path / "a")
    assert store.source(lora_id) == "memory" and store.in_memory() == [lora_id]
    expected = world.pool.expected_bytes(lora_id)
    slots = place(world, lora_id)
    assert store.source(lora_id) == "host" and store.in_memory() == []
    assert torch.equal(store.host_slots(lora_id), slots)
    assert torch.equal(store.host_bytes(lora_id), expected)
    assert torch.equal(device_bytes(world, lora_id), expected)
    store.drop_host(lora_id)
    assert store.source(lora_id) == "file" and not store._packed
    assert torch.equal(device_bytes(world, lora_id), expected)
    assert torch.equal(world.pool.expected_bytes(lora_id), expected)
    assert torch.equal(world.pool.expected_bytes(lora_id, from_files=True), expected)


def test_cpu_tensors_are_gone_once_the_adapter_has_a_host_copy(world: World, tmp_path: Path) -> None:
    lora_id = add(world, tmp_path / "a")
    adapter = world.lora_manager.loras[lora_id]
    alive = [weakref.ref(t) for layer in adapter.layers for t in layer.weights.values()]
    scaling, rank = adapter.scaling, adapter.config.r
    assert len(alive) == 2 * SHAPE.layers * 3  # A and B of qkv_proj, o_proj and gate_up_proj
    place(world, lora_id)
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]
    assert (adapter.scaling, adapter.config.r) == (scaling, rank)
    world.pool.load(lora_id, scattered_slots(world.pool.slots_needed(lora_id), 4096, 16, 1))
    world.batch([(lora_id, 2), (None, 1)])  # SGLang's own calls still work


def test_loading_from_memory_with_a_host_pool_leaves_no_second_copy(world: World, tmp_path: Path) -> None:
    lora_id = add(world, tmp_path / "a")
    device_bytes(world, lora_id)
    assert world.pool.store.source(lora_id) == "file"


def test_without_a_host_pool_the_cpu_tensors_stay_the_source(tmp_path: Path) -> None:
    world = make_world(page_size=16)
    lora_id = add(world, tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    first, second = device_bytes(world, lora_id), device_bytes(world, lora_id, seed=4)
    assert torch.equal(first, second) and world.pool.store.source(lora_id) == "memory"
    with pytest.raises(ValueError, match="--elora-host-memory is 0"):
        world.pool.store.start_read(lora_id, torch.arange(16))


def test_a_transfer_by_ascending_slots(world: World, tmp_path: Path) -> None:
    pool, store, lora_id = world.pool, world.pool.store, add(world, tmp_path / "a")
    expected = pool.expected_bytes(lora_id)
    place(world, lora_id)
    slots = scattered_slots(pool.slots_needed(lora_id), 4096, 16, 5)
    pool.adopt(lora_id, slots)
    assert pool.resident.keys() == {lora_id} and not torch.equal(pool.read_bytes(lora_id), expected)
    copy_rows(store.host, store.host_slots(lora_id), pool.pool, pool.resident[lora_id])
    assert torch.equal(pool.read_bytes(lora_id), expected)
    with pytest.raises(ValueError, match="already resident"):
        pool.adopt(lora_id, slots)


def copy_rows(source: Any, source_slots: torch.Tensor, target: Any, target_slots: torch.Tensor) -> None:
    for layer in range(source.num_layers):
        for stream in (0, 1):
            target.byte_rows(layer, stream)[target_slots] = source.byte_rows(layer, stream)[source_slots]


def test_a_read_does_not_hold_up_its_caller(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, first, second = world.pool.store, add(world, tmp_path / "a", 1), add(world, tmp_path / "b", 2)
    for lora_id in (first, second):
        assert store.drop_cpu_tensors(lora_id)
    disk, reading = threading.Event(), threading.Event()

    def slow(path: str) -> Any:
        reading.set()
        assert disk.wait(30)
        return read_folder(path)

    monkeypatch.setattr(adapter_reader, "read_folder", slow)
    store.start_read(first, host_slots(world, first))
    store.start_read(second)
    assert reading.wait(30)
    assert store.poll_reads() == [] and first in store._reader and store.source(first) == "file"
    with pytest.raises(ValueError, match="being read already"):
        store.start_read(first)
    disk.set()
    assert store.poll_reads(wait=True) == [(first, None), (second, None)]
    assert (store.source(first), store.source(second)) == ("host", "memory")
    assert first not in store._reader and store.poll_reads() == []
    for lora_id in (first, second):
        assert torch.equal(device_bytes(world, lora_id), world.pool.expected_bytes(lora_id, from_files=True))


def vanish(folder: Path) -> None:
    shutil.rmtree(folder)


def lose_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def change_a_value(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1
    save_file({name: t.clone() for name, t in tensors.items()}, folder / WEIGHTS)


def change_alpha(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (vanish, "no such folder"),
        (lose_weights, "file is missing"),
        (truncate, "truncated safetensors"),
        (change_a_value, "holds other content than when adapter 'sql' was loaded"),
        (change_alpha, "holds other content than when adapter 'sql' was loaded"),
    ],
)
def test_a_spoiled_file_is_named_others_load_and_it_recovers(
    world: World, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    store, folder = world.pool.store, tmp_path / "a"
    lora_id, other = add(world, folder, 1), add(world, tmp_path / "b", 2)
    expected = world.pool.expected_bytes(lora_id)
    place(world, lora_id)
    store.drop_host(lora_id)  # evicted from the host: only the file is left
    shutil.copytree(folder, tmp_path / "former")
    spoil(folder)
    slots = host_slots(world, lora_id)
    store.start_read(lora_id, slots)
    store.start_read(other, host_slots(world, other))
    ((failed, error), (fine, nothing)) = store.poll_reads(wait=True)
    assert (failed, fine, nothing) == (lora_id, other, None)
    assert isinstance(error, AdapterError) and error.status_code == 400
    assert words in str(error) and str(folder) in str(error) and "\n" not in str(error)
    assert lora_id not in store._packed and store.source(lora_id) == "file"
    with pytest.raises(AdapterError):
        world.pool.load(lora_id, scattered_slots(world.pool.slots_needed(lora_id), 4096, 16, 1))
    assert lora_id not in world.pool.resident
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / "former", folder)
    store.start_read(lora_id, slots)
    assert store.poll_reads(wait=True) == [(lora_id, None)]
    assert torch.equal(store.host_bytes(lora_id), expected)


def test_a_file_that_spoils_does_not_touch_a_host_copy(world: World, tmp_path: Path) -> None:
    lora_id = add(world, tmp_path / "a")
    expected = world.pool.expected_bytes(lora_id)
    place(world, lora_id)
    change_a_value(tmp_path / "a")
    assert torch.equal(device_bytes(world, lora_id), expected)
    with pytest.raises(AdapterError, match="holds other content"):
        world.pool.expected_bytes(lora_id, from_files=True)


def test_any_fault_of_a_read_is_an_answer(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, lora_id = world.pool.store, add(world, tmp_path / "a")
    store.drop_cpu_tensors(lora_id)

    def broken(path: str) -> Any:
        raise MemoryError("no room\nfor it")

    monkeypatch.setattr(adapter_reader, "read_folder", broken)
    store.start_read(lora_id, host_slots(world, lora_id))
    ((_, error),) = store.poll_reads(wait=True)
    assert str(error).endswith("cannot be read (MemoryError: no room for it). Load the adapter again.")


def test_bytes_without_a_file_never_leave_memory(world: World, tmp_path: Path) -> None:
    store, lora_id = world.pool.store, add(world, tmp_path / "a", file=False)
    shutil.rmtree(tmp_path / "a")
    expected = world.pool.expected_bytes(lora_id, from_files=True)
    assert not store.drop_cpu_tensors(lora_id) and store.source(lora_id) == "memory"
    for seed in range(3):
        slots = place(world, lora_id)
        assert store.in_memory() == [] and lora_id not in store._kept  # the host copy is the only one
        assert torch.equal(world.pool.expected_bytes(lora_id, from_files=True), expected)
        store.drop_host(lora_id)
        for layer in range(SHAPE.layers):  # the slots are somebody else's now
            for stream in (0, 1):
                store.host.byte_rows(layer, stream)[slots] = 0xEE
        store.host.free(slots)
        assert store.source(lora_id) == "memory"
        assert torch.equal(device_bytes(world, lora_id, seed), expected)
        assert store.source(lora_id) == "memory"


def test_unloaded_while_it_is_read(world: World, tmp_path: Path) -> None:
    store, lora_id = world.pool.store, add(world, tmp_path / "a")
    store.start_read(lora_id, host_slots(world, lora_id))
    del world.lora_manager.loras[lora_id]
    world.pool.remove_lora(lora_id)
    ((_, error),) = store.poll_reads(wait=True)
    assert "was unloaded while it was being read" in str(error) and not store._packed


def test_a_flush_forgets_copies_and_waits_for_reads(world: World, tmp_path: Path) -> None:
    store = world.pool.store
    first, second = add(world, tmp_path / "a", 1), add(world, tmp_path / "b", 2, file=False)
    place(world, second)
    store.start_read(first, host_slots(world, first))
    store.drop_all()
    assert not store._packed and store.poll_reads() == []
    assert (store.source(first), store.source(second)) == ("memory", "memory")


def test_registering_many_adapters_keeps_few_in_memory(world: World, tmp_path: Path) -> None:
    ids = []
    for seed in range(12):
        ids.append(add(world, tmp_path / str(seed), seed, file=seed != 0))
        size = sum(
            t.nbytes for layer in world.lora_manager.loras[ids[-1]].layers for t in layer.weights.values()
        )
        bound_waiting(world.lora_manager, ids[-1], limit=3 * size)
        assert len(world.pool.store.in_memory()) <= 4
    assert world.pool.store.in_memory() == [ids[0], *ids[-3:]]  # the one without a file, and the newest
    for lora_id in ids:
        assert torch.equal(device_bytes(world, lora_id), world.pool.expected_bytes(lora_id, from_files=True))


def test_layers_are_waited_for_before_their_weights_are_read(world: World, tmp_path: Path) -> None:
    lora_id = add(world, tmp_path / "a")
    pool = world.pool
    expected = pool.expected_bytes(lora_id)
    place(world, lora_id)
    pool.adopt(lora_id, scattered_slots(pool.slots_needed(lora_id), 4096, 16, 2))
    waited: list[int] = []

    def arrive(layer: int) -> None:
        waited.append(layer)
        for stream in (0, 1):
            rows = pool.store.host.byte_rows(layer, stream)[pool.store.host_slots(lora_id)]
            pool.pool.byte_rows(layer, stream)[pool.resident[lora_id]] = rows

    pool.layer_fence = arrive
    x = torch.randn(3, SHAPE.hidden, generator=torch.Generator().manual_seed(0))
    outputs = []
    for _ in range(2):
        world.batch([(lora_id, 3)])
        outputs.append(world.layer(1, "qkv_proj")(x)[0])
    assert waited == [1, 1] and torch.equal(*outputs)
    world.layer(0, "qkv_proj")(x)
    assert torch.equal(pool.read_bytes(lora_id), expected)
    pool.drop(lora_id)
    pool.layer_fence = None
    pool.load(lora_id, scattered_slots(pool.slots_needed(lora_id), 4096, 16, 9))
    world.batch([(lora_id, 3)])
    assert torch.equal(world.layer(1, "qkv_proj")(x)[0], outputs[0])
