"""The host pool: same rows as the device pool, whole pages, one owner per slot, one clear error."""

from __future__ import annotations

import gc
import random
from itertools import pairwise

import pytest
import torch
from support.packed_pool import DTYPES, make_layout, make_matrices, make_pool, walk
from support.transfer_world import LAYERS, make_device

from elora_sglang.runtime.pool import host as host_pool
from elora_sglang.runtime.pool.host import HostMemoryError, HostPool
from elora_sglang.runtime.pool.packing import PackedAdapter


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_rows_are_those_of_the_device(dtype: torch.dtype, page: int) -> None:
    device = make_device(dtype, page)
    host = HostPool(100, device, pin=False)
    assert host.num_slots == host.rows == host.available == 100 - 100 % page
    assert (host.row_bytes, host.num_layers, host.page_size) == (device.row_bytes, LAYERS, page)
    assert host.nbytes == host.num_slots * LAYERS * sum(device.row_bytes)
    assert host.device.type == "cpu" and not host.pinned


def test_a_layer_is_contiguous_and_nothing_overlaps() -> None:
    host = HostPool(32, make_device(), pin=False)
    edges = []
    for layer in range(LAYERS):
        for stream in (0, 1):
            rows = host.byte_rows(layer, stream)
            assert rows.is_contiguous() and rows.data_ptr() % 16 == 0
            edges.append((rows.data_ptr(), rows.data_ptr() + rows.numel()))
    assert all(end == begin for (_, end), (begin, _) in pairwise(edges))
    assert edges[-1][1] - edges[0][0] == host.nbytes


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_are_packed_into_it(dtype: torch.dtype, page: int) -> None:
    device = make_pool(torch.bfloat16, page)
    layout = make_layout(device, dtype)
    host = HostPool(2 * layout.slots + 8 * page, device, pin=False)
    holes = [host.alloc(page) for _ in range(8)]
    for hole in holes[::2]:
        assert hole is not None
        host.free(hole)
    slots = host.alloc(layout.slots)
    assert slots is not None
    matrices = make_matrices(dtype)
    packed = PackedAdapter(host, layout, slots, dtype)
    packed.write(lambda layer: matrices[layer])
    for layer, found in enumerate(packed.read()):
        walked = walk(host, layout, slots, dtype, layer)
        for key, matrix in matrices[layer].items():
            assert torch.equal(found[key], matrix) and torch.equal(walked[key], matrix)


def test_alloc_prefers_one_run() -> None:
    host = HostPool(100, make_device(), pin=False)
    taken = [host.alloc(10) for _ in range(10)]
    assert host.alloc(1) is None and host.available == 0
    assert all(t is not None and t.tolist() == list(range(t[0], t[0] + 10)) for t in taken)
    for index in (1, 4, 5, 8):
        host.free(taken[index])  # type: ignore[arg-type]
    run = host.alloc(20)
    assert run is not None and run.tolist() == list(range(40, 60)), "the only run of twenty"
    both = host.alloc(15)
    assert both is not None and both.tolist() == sorted(both.tolist()), "two runs, ascending"
    assert host.available == 5 and host.alloc(6) is None and host.available == 5
    assert host.alloc(0).tolist() == []  # type: ignore[union-attr]


@pytest.mark.parametrize("page", [1, 4])
def test_random_use_against_a_set(page: int) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    host = HostPool(64 * page, make_device(page=page), pin=False)
    held: list[torch.Tensor] = []
    for _ in range(600):
        owned = {int(slot) for slots in held for slot in slots}
        assert host.available == host.num_slots - len(owned)
        assert host.used_slots().tolist() == sorted(owned)
        if held and rng.random() < 0.5:
            together = torch.cat([held.pop(rng.randrange(len(held))) for _ in range(min(len(held), 2))])
            host.free(together[torch.randperm(len(together))])
            continue
        want = rng.randrange(1, 20) * page
        got = host.alloc(want)
        assert (got is None) == (want > host.num_slots - len(owned))
        if got is not None:
            assert got.dtype == torch.int64 and len(got) == want
            assert not owned & set(got.tolist()) and got.tolist() == sorted(set(got.tolist()))
            assert all(int(start) % page == 0 for start in got[::page])
            held.append(got)
    for slots in held:
        host.free(slots)
    assert host._runs._length == {0: 64}, "all runs joined again"
    whole = host.alloc(host.num_slots)
    assert whole is not None and whole.tolist() == list(range(host.num_slots))


def test_wrong_frees_change_nothing() -> None:
    host = HostPool(64, make_device(page=4), pin=False)
    slots = host.alloc(8)
    assert slots is not None
    for wrong, text in (
        (slots[:6], "whole pages"),
        (torch.cat([slots, slots]), "twice"),
        (torch.arange(8, 16), "twice"),
        (torch.arange(62, 66), "outside"),
        (torch.arange(-4, 0), "outside"),
    ):
        with pytest.raises(ValueError, match=text):
            host.free(wrong)
        assert host.available == 56
    host.free(slots)
    with pytest.raises(ValueError, match="twice"):
        host.free(slots)
    assert host.available == 64
    host.alloc(32)
    host.clear()
    assert host.available == 64 and not len(host.used_slots())


@pytest.mark.parametrize("count", [3, -4])
def test_torn_allocations_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        HostPool(64, make_device(page=4), pin=False).alloc(count)


def test_too_small() -> None:
    with pytest.raises(ValueError, match="no page"):
        HostPool(3, make_device(page=4), pin=False)


def test_memory_that_is_not_there() -> None:
    device = make_device()
    with pytest.raises(HostMemoryError, match=r"0\.0288 MB|2\.88e-05 GB.*--elora-host-memory"):
        HostPool(100, device, pin=False, available=lambda: 1000)
    slots = (1 << 55) // (LAYERS * sum(device.row_bytes))
    with pytest.raises(HostMemoryError, match=r"GB of host memory.*--elora-host-memory") as raised:
        HostPool(slots, device, pin=False, available=lambda: None)
    assert isinstance(raised.value, MemoryError)
    assert HostPool(100, device, pin=False, available=lambda: 10**9).available == 100


def test_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": ["MemTotal: 9 kB", "MemAvailable:    4000 kB"]}
    monkeypatch.setattr(host_pool, "_lines", lambda path: files.get(path, []))
    assert host_pool.available_memory() == 4_096_000
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    files["/sys/fs/cgroup/memory.current"] = ["1000"]
    assert host_pool.available_memory() == 4_096_000
    files["/sys/fs/cgroup/memory.max"] = ["5000"]
    assert host_pool.available_memory() == 4000
    files.clear()
    assert host_pool.available_memory() is None


class Cuda:
    """Stands for ``torch.cuda``: notes what is locked and unlocked."""

    def __init__(self, status: int = 0) -> None:
        self.calls: list[str] = []
        self.status = status

    def cudart(self) -> Cuda:
        return self

    def synchronize(self) -> None:
        self.calls.append("wait")

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:
        self.calls.append("lock")
        return 0

    def cudaHostUnregister(self, pointer: int) -> int:
        self.calls.append("unlock")
        return self.status


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_pinned_memory_is_unlocked_once_behind_all_copies(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, closed: int
) -> None:
    """However often it is closed, and when it is collected without."""
    cuda = Cuda(status=0 if closed else 7)
    for name in ("cudart", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    host = HostPool(32, make_device(), pin=False)
    host._pin()
    assert cuda.calls == ["lock"] and host.pinned
    for _ in range(closed):
        host.close()
        assert cuda.calls == ["lock", "wait", "unlock"] and not host.pinned
    del host
    gc.collect()
    assert cuda.calls == ["lock", "wait", "unlock"]
    assert ("CUDA error 7" in caplog.text) == (not closed)
