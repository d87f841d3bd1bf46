"""The host tier's memory: copies of KV token slots, for tokens and adapters alike."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

import torch

from elora_sglang.runtime.pool.views import UnifiedPool

logger = logging.getLogger(__name__)


class HostMemoryError(MemoryError):
    """The host pool's memory cannot be had; the text says how much was asked and which flag to lower."""


class HostPool(UnifiedPool):
    """Host copies of slots: one K row and one V row per layer, with the row sizes of the device pool.

    Reads and writes like :class:`UnifiedPool` (its device is the CPU), so adapters are packed into it the
    same way. All K rows of a layer lie one after the other, then all its V rows, then the next layer: a
    layer of consecutive slots is two plain copies. Slots are handed out in whole pages, consecutive ones
    where there are any.

    Args:
        num_slots: slots wanted; rounded down to whole pages, at least one page.
        like: the device pool; gives layers, row sizes and page size.
        pin: lock the memory into RAM for asynchronous copies; only with a device pool on CUDA.
        available: bytes that may be taken, None when unknown; for tests.

    Raises:
        HostMemoryError: the memory cannot be had, or cannot be pinned. Nothing stays allocated.
        ValueError: less than one page.
    """

    def __init__(
        self,
        num_slots: int,
        like: UnifiedPool,
        *,
        pin: bool,
        available: Callable[[], int | None] | None = None,
    ) -> None:
        page = like.page_size
        pages = num_slots // page
        if pages < 1:
            raise ValueError(f"elora: a host pool of {num_slots} slots holds no page of {page}")
        self.num_slots = pages * page
        self.slot_bytes = like.num_layers * sum(like.row_bytes)
        self.nbytes = self.num_slots * self.slot_bytes
        self._memory = _reserve(self.nbytes, available or available_memory)
        self._pinned = False
        self._unpin: Callable[[], object] | None = None
        if pin and like.device.type == "cuda":
            self._pin()
        k_rows, v_rows = (self.num_slots * size for size in like.row_bytes)
        k, v = [], []
        for layer in range(like.num_layers):
            start = layer * (k_rows + v_rows)
            k.append(self._memory[start : start + k_rows].view(self.num_slots, 1, like.row_bytes[0]))
            start += k_rows
            v.append(self._memory[start : start + v_rows].view(self.num_slots, 1, like.row_bytes[1]))
        super().__init__(k, v, page_size=page)
        self._runs = _FreeRuns(pages)
        self._used = bytearray(pages)
        self._in_page = torch.arange(page)

    @property
    def available(self) -> int:
        """Slots that are free."""
        return self._runs.free * self.page_size

    @property
    def pinned(self) -> bool:
        return self._pinned

    def alloc(self, n: int) -> torch.Tensor | None:
        """``n`` slots in whole pages: int64 ``[n]`` on the CPU, ascending; None when fewer are free.

        Raises:
            ValueError: ``n`` is negative or not a multiple of the page size.
        """
        pages, rest = divmod(n, self.page_size)
        if n < 0 or rest:
            raise ValueError(f"elora: {n} host slots are not whole pages of {self.page_size}")
        taken = self._runs.take(pages)
        if taken is None:
            return None
        taken.sort()
        for first, count in taken:
            self._used[first : first + count] = b"\1" * count
        page = self.page_size
        parts = [torch.arange(first * page, (first + count) * page) for first, count in taken]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0).long()

    def free(self, slots: torch.Tensor) -> None:
        """Give slots back: int64 ``[n]``, whole pages, any order, of any number of allocations.

        Raises:
            ValueError: a slot outside the pool, a torn page, or a slot that is free already (also: one that
                occurs twice). Nothing is freed then.
        """
        if not slots.numel():
            return
        # Plain numbers, not tensors: a node's slots are few, and mostly one or two runs of them.
        ordered = sorted(slots.tolist())
        if ordered[0] < 0 or ordered[-1] >= self.num_slots:
            raise ValueError(f"elora: host slots {ordered[0]}..{ordered[-1]} are outside {self.num_slots}")
        page, runs = self.page_size, []
        twice = len(set(ordered)) != len(ordered)
        for first, behind in _runs_of(ordered):
            begin, end = first // page, -(-behind // page)
            if twice or self._used.count(1, begin, end) != end - begin:
                raise ValueError("elora: a host slot was freed twice")
            if first % page or behind % page:
                raise ValueError(f"elora: freed host slots are not whole pages of {page}")
            runs.append((begin, end - begin))
        for begin, count in runs:
            self._used[begin : begin + count] = bytes(count)
            self._runs.give(begin, count)

    def used_slots(self) -> torch.Tensor:
        """All slots that are not free: int64, ascending, a copy. For the auditor."""
        pages = torch.tensor(list(self._used)).nonzero().flatten()
        return (pages[:, None] * self.page_size + self._in_page).flatten()

    def clear(self) -> None:
        """Free everything, as after a flush."""
        self._used = bytearray(self.num_slots // self.page_size)
        self._runs = _FreeRuns(self.num_slots // self.page_size)

    def close(self) -> None:
        """Unlock pinned memory, after all copies from and to it. The pool must not be used any more. Idempotent.

        A pool that is collected does so by itself: what the system unmaps must not stay locked, because the next
        memory at that address could not be.
        """
        if self._unpin is not None:
            self._pinned = False
            self._unpin()

    def _pin(self) -> None:
        # Registering our own memory: torch's pinned allocator rounds up to a power of two.
        status = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self.nbytes, 0)
        if int(status) != 0:
            raise HostMemoryError(
                f"elora: {_gb(self.nbytes)} of host memory cannot be pinned (CUDA error {int(status)}; "
                "see `ulimit -l`); lower --elora-host-memory"
            )
        self._pinned = True
        finalizer = weakref.finalize(self, _unlock, self._memory)
        finalizer.atexit = False  # the end of the process unlocks everything, when CUDA may be gone already
        self._unpin = finalizer


def _unlock(memory: torch.Tensor) -> None:
    torch.cuda.synchronize()
    status = torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
    if int(status) != 0:
        logger.warning("elora: pinned host memory was not unlocked (CUDA error %d)", int(status))


def available_memory() -> int | None:
    """Bytes this process can still take: the kernel's estimate or the control group's, whichever is less."""
    found = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for limit, usage in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        values = [line.strip() for file in (limit, usage) for line in _lines(file)[:1]]
        if len(values) == 2 and all(value.isdigit() for value in values):
            found.append(max(0, int(values[0]) - int(values[1])))
    return min(found) if found else None


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().splitlines()
    except OSError:
        return []


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB"


def _reserve(nbytes: int, available: Callable[[], int | None]) -> torch.Tensor:
    """``nbytes`` bytes that are really there, or HostMemoryError."""
    left = available()
    # Ask first: an over-committing kernel grants any size and kills the process when it is touched.
    if left is not None and nbytes > left:
        raise HostMemoryError(
            f"elora: the host pool needs {_gb(nbytes)} of host memory, {_gb(left)} are available; "
            "lower --elora-host-memory"
        )
    try:
        # Touched now: page faults during serving would look like a slow link.
        return torch.empty(nbytes, dtype=torch.uint8).zero_()
    except (RuntimeError, MemoryError) as error:
        raise HostMemoryError(
            f"elora: the host pool needs {_gb(nbytes)} of host memory, which the system refused; "
            "lower --elora-host-memory"
        ) from error


def _runs_of(ordered: list[int]) -> list[tuple[int, int]]:
    """``(first, behind)`` of the runs of consecutive numbers in an ascending list."""
    first, behind = ordered[0], ordered[-1] + 1
    if behind - first == len(ordered):
        return [(first, behind)]
    runs, behind = [], first
    for number in ordered:
        if number != behind:
            runs.append((first, behind))
            first = number
        behind = number + 1
    return [*runs, (first, behind)]


class _FreeRuns:
    """Free pages as maximal runs, in size classes by powers of two. Every operation is cheap and
    deterministic: dictionaries keep insertion order."""

    #: Runs of a request's own size class that are tried before a larger class is broken.
    TRIES = 8

    def __init__(self, pages: int) -> None:
        self.free = 0
        self._length: dict[int, int] = {}  # first page -> pages of the run
        self._first: dict[int, int] = {}  # page behind the run -> its first page
        self._classes: list[dict[int, None]] = [{} for _ in range(pages.bit_length() + 1)]
        self.give(0, pages)

    def take(self, pages: int) -> list[tuple[int, int]] | None:
        """Runs ``(first page, pages)`` that together have ``pages`` pages; None when fewer are free."""
        if pages > self.free:
            return None
        taken: list[tuple[int, int]] = []
        while pages:
            first = self._fitting(pages)
            if first is None:  # no single run is long enough: the longest kind first, so that few are needed
                first = next(iter(next(runs for runs in reversed(self._classes) if runs)))
            length = self._remove(first)
            count = min(length, pages)
            if count < length:
                self._add(first + count, length - count)
            taken.append((first, count))
            pages -= count
            self.free -= count
        return taken

    def give(self, first: int, count: int) -> None:
        """A run is free again; joins its neighbours."""
        self.free += count
        if first in self._first:
            before = self._first[first]
            count += self._remove(before)
            first = before
        if first + count in self._length:
            count += self._remove(first + count)
        self._add(first, count)

    def _fitting(self, pages: int) -> int | None:
        own = pages.bit_length()
        for tried, first in enumerate(self._classes[own]):
            if self._length[first] >= pages:
                return first
            if tried == self.TRIES:
                break
        for runs in self._classes[own + 1 :]:
            if runs:
                return next(iter(runs))
        return None

    def _add(self, first: int, count: int) -> None:
        self._length[first] = count
        self._first[first + count] = first
        self._classes[count.bit_length()][first] = None

    def _remove(self, first: int) -> int:
        count = self._length.pop(first)
        del self._first[first + count]
        del self._classes[count.bit_length()][first]
        return count
