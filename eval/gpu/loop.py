"""A small serving loop in PyTorch around the package's own core, runtime and kernels: no SGLang needed.

Llama-shaped layers with dummy weights (no rotary embedding, greedy on random logits), continuous batching, attention by
gathering K and V of each request. It is no server: its times say what adapters, copies and kernels do, not what SGLang
would do. The cache manager, the swap driver, both pools, the transfers and the LoRA kernels are those of ``--elora``.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch.nn import functional

from elora_sglang.core.costs import Costs
from elora_sglang.core.executor import Executor
from elora_sglang.core.manager import CacheManager
from elora_sglang.core.swapper import SwapSettings, switches
from elora_sglang.core.tree.node import Node
from elora_sglang.eval.gpu.cases.paged_lora import place
from elora_sglang.eval.gpu.llama import Shape, layout
from elora_sglang.eval.support.lora_pool import StandInPool
from elora_sglang.kernels.paged_lora import plan_segments
from elora_sglang.kernels.paged_lora import triton_kernel as paged_lora
from elora_sglang.kernels.paged_lora.tables import DeviceBatch, TableSet
from elora_sglang.runtime.pool.host import HostPool
from elora_sglang.runtime.pool.layout import AdapterLayout
from elora_sglang.runtime.pool.packing import PackedAdapter
from elora_sglang.runtime.pool.slots import SlotPayloads
from elora_sglang.runtime.pool.views import UnifiedPool
from elora_sglang.runtime.swap_driver import CacheStats, SwapDriver
from elora_sglang.runtime.transfers.engine import TransferEngine

DTYPE = torch.bfloat16


def _fill(rows: torch.Tensor) -> None:
    """Small random numbers, the same ones over and over: drawing gigabytes would take minutes."""
    block = torch.empty(min(len(rows), 1024), rows.shape[1], dtype=DTYPE).normal_(std=0.02)
    for first in range(0, len(rows), len(block)):
        part = rows[first : first + len(block)]
        part.copy_(block[: len(part)])


class Slots:
    """Device slots as SGLang's allocator gives them; slot 0 is never given. On the CPU, as plain lists are."""

    def __init__(self, count: int) -> None:
        self._free = torch.arange(1, count)

    def available_size(self) -> int:
        """How many are free."""
        return len(self._free)

    def alloc(self, need: int) -> torch.Tensor | None:
        """``need`` slots, or None."""
        if need > len(self._free):
            return None
        given, self._free = self._free[:need], self._free[need:]
        return given

    def free_segment(self, slots: torch.Tensor, start_pos: int = 0) -> None:
        """Take slots back."""
        self._free = torch.cat([self._free, slots.cpu()])


class Weights(StandInPool):
    """Where adapters are on the device: a load brings their bytes. ``packed``: for the kernels."""

    def __init__(self, pool: UnifiedPool, layouts: dict[str, AdapterLayout]) -> None:
        super().__init__({name: one.slots for name, one in layouts.items()})
        self.rows, self.layouts = pool, layouts
        self.packed: dict[str, PackedAdapter] = {}

    def adopt(self, lora_id: str, slots: torch.Tensor) -> None:
        """It is resident in ``slots``."""
        super().adopt(lora_id, slots)
        self.packed[lora_id] = PackedAdapter(self.rows, self.layouts[lora_id], slots, DTYPE)


class Model:
    """Dummy weights of a Llama-shaped model, and one forward over paged K and V."""

    def __init__(self, shape: Shape, device: torch.device, pool: UnifiedPool, tables: TableSet) -> None:
        self.shape, self.device, self.pool, self.tables = shape, device, pool, tables

        def random(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=device, dtype=DTYPE)

        self._linear = [
            {m.name: random(sum(m.widths), m.in_features) / m.in_features**0.5 for m in shape.modules}
            for _ in range(shape.layers)
        ]
        self._embed = random(shape.vocab, shape.hidden)
        self._places = {
            (layer, m.name): place(pool, DTYPE, layer, tables, m.name, m.widths)
            for layer in range(shape.layers)
            for m in shape.modules
        }

    def _apply(self, x: torch.Tensor, layer: int, name: str, batch: DeviceBatch | None) -> torch.Tensor:
        out = functional.linear(x, self._linear[layer][name])
        if batch is not None:
            paged_lora.add_lora(x, out, batch, self._places[layer, name], paged_lora.Config())
        return out

    def forward(
        self, tokens: torch.Tensor, written: torch.Tensor, read: torch.Tensor, mask: torch.Tensor | None,
        batch: DeviceBatch | None, wait_layer: Callable[[int], object],
    ) -> torch.Tensor:  # fmt: skip
        """Logits of every row.

        Args:
            tokens, written: ids ``[rows]`` and the slot of each.
            read: slots ``[requests, context]``; rows of a request lie together, as many for each.
            mask: ``[requests, 1, rows of a request, context]``, what a row may see; None: what came before it, where
                the rows are the whole context.
            wait_layer: called before a layer reads its slots.
        """
        heads, (kv_heads, size) = self.shape.heads, self.shape.kv_row
        x = functional.embedding(tokens, self._embed)
        requests = len(read)
        for layer in range(self.shape.layers):
            wait_layer(layer)
            normed = functional.rms_norm(x, (x.shape[-1],))
            qkv = self._apply(normed, layer, "qkv_proj", batch)
            q, k, v = qkv.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
            keys, values = (self.pool.byte_rows(layer, stream).view(DTYPE) for stream in (0, 1))
            keys.index_copy_(0, written, k.contiguous())
            values.index_copy_(0, written, v.contiguous())
            query, key, value = (
                one.view(requests, -1, many, size).transpose(1, 2)
                for one, many in ((q, heads), (keys[read], kv_heads), (values[read], kv_heads))
            )
            seen = functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            seen = seen.transpose(1, 2).reshape(len(tokens), heads * size)
            x = x + self._apply(seen, layer, "o_proj", batch)
            normed = functional.rms_norm(x, (x.shape[-1],))
            gate, up = self._apply(normed, layer, "gate_up_proj", batch).chunk(2, dim=-1)
            x = x + self._apply(functional.silu(gate) * up, layer, "down_proj", batch)
        return functional.linear(functional.rms_norm(x, (x.shape[-1],)), self._embed)


@dataclass
class Job:
    """One request, and what became of it. Times in seconds of the loop's clock."""

    rid: str
    adapter: str
    tokens: array[int]
    answer: int
    arrived: float
    made: list[int] = field(default_factory=list)
    first: float = -1.0
    ended: float = -1.0
    slots: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    lock: Node | None = None
    cached: int = 0

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.arrived


class Loop:
    """Continuous batching: prefills one request at a time before the next decode step of all others.

    Args:
        device_slots, host_slots: sizes of the pools.
        adapters: LoRA rank by name; all begin in the host pool.
        without: parts of the swapper that are switched off.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        device_slots: int,
        host_slots: int,
        adapters: dict[str, int],
        without: Sequence[str] = (),
    ) -> None:
        self.device = device
        size = (device_slots + 1, *shape.kv_row)
        rows = [torch.zeros(size, device=device, dtype=DTYPE) for _ in range(2 * shape.layers)]
        self.pool = UnifiedPool(rows[: shape.layers], rows[shape.layers :], page_size=1)
        self.host = HostPool(host_slots, self.pool, pin=device.type == "cuda")
        for layer in range(shape.layers):
            for stream in (0, 1):
                _fill(self.host.byte_rows(layer, stream).view(DTYPE))
        self.engine = TransferEngine(self.pool, self.host)
        layouts = {name: layout(shape, rank, shape.layers, 1) for name, rank in adapters.items()}
        self.slots, self.weights = Slots(device_slots + 1), Weights(self.pool, layouts)
        settings = SwapSettings(host_slots=self.host.num_slots, **switches(frozenset(without)))
        self.manager = CacheManager(1, device_slots, "elora", SlotPayloads(), settings, Costs.default())
        self.driver = SwapDriver(
            self.manager,
            self.slots,
            self.weights,
            SimpleNamespace(host=self.host, engine=self.engine),  # type: ignore[arg-type]
            CacheStats(),
        )
        self.executor = Executor(self.manager, self.driver)
        for name, one in layouts.items():
            taken = self.host.alloc(one.slots)
            if taken is None:
                raise ValueError(f"a host pool of {host_slots} slots has no room for {name}")
            self.manager.place_on_host(self.manager.register(name, one.slots), taken)
        self.model = Model(shape, device, self.pool, TableSet([m.name for m in shape.modules], device))
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self._started = time.perf_counter()

    def now(self) -> float:
        """Seconds since the loop was made."""
        return time.perf_counter() - self._started

    def submit(self, job: Job) -> None:
        """It waits from now on."""
        self.waiting.append(job)
        self.manager.enqueue(job.rid, job.adapter, job.tokens[:-1])

    def step(self) -> list[Job]:
        """One iteration; returns the jobs that ended in it."""
        finished = self.driver.finished()
        self.driver.book_ended(finished, follower=False)
        free = self.slots.available_size()
        self.executor.run(self.manager.tick(self.now(), free, finished, running=len(self.running)))
        for job in list(self.waiting):
            if self.manager.ready(job.rid) and self._admit(job):
                self.waiting.remove(job)
                self._prefill(job)
                self.running.append(job)
                break
        else:
            if self.running:
                self._decode()
        return self._end()

    def run(self, jobs: Sequence[Job]) -> None:
        """Submit jobs when they arrive, until all have ended."""
        coming, left = sorted(jobs, key=lambda job: job.arrived), len(jobs)
        offset = self.now()
        for job in coming:
            job.arrived += offset
        while left:
            while coming and coming[0].arrived <= self.now():
                self.submit(coming.pop(0))
            left -= len(self.step())

    # -- the life of a job --------------------------------------------------------------------------

    def _admit(self, job: Job) -> bool:
        """Adapter and tokens fit together, or it waits; what is missing is on its way afterwards."""
        manager = self.manager
        adapter = manager.tree.adapter(job.adapter)
        assert adapter is not None
        match = manager.match(adapter, job.tokens[:-1])
        held = match.node
        bring = 0 if adapter.resident else adapter.size
        unlocked = sum(n.size for n in (*manager.tree.path(held), adapter) if n.evictable)
        new = len(job.tokens) + job.answer - match.length
        room = self.slots.available_size() + manager.tree.evictable_size - unlocked
        if new + bring > room:
            return False
        if not adapter.resident:
            load = manager.load_for(adapter)
            if load is None or not self.executor.load(load):
                return False
        manager.lock(held)
        last = held
        if match.host_length:
            load = manager.load_for(match.host_node)
            if load is not None and self.executor.load(load):
                last = match.host_node
        manager.lock(last)
        manager.unlock(held)
        cached = match.length + (match.host_length if last is not held else 0)
        need = len(job.tokens) + job.answer - cached
        self.executor.make_room(need)
        own = self.slots.alloc(need)
        if own is None:
            manager.unlock(last)
            return False
        path = [node.payload for node in manager.tree.path(last) if node.kind == "kv"]
        job.slots = torch.cat([*path, own]) if path else own
        job.lock, job.cached = last, cached
        manager.started(job.rid, last)
        return True

    def _fence(self, jobs: Sequence[Job]) -> None:
        used = set()
        for job in jobs:
            node = job.lock
            while node is not None and node.parent is not None:
                if node.transfer in self.driver.loading:
                    used.add(node.transfer)
                node = node.parent
        self.engine.fence(sorted(used))

    def _lora(self, jobs: Sequence[Job], rows: int) -> DeviceBatch:
        adapters = [self.weights.packed[job.adapter] for job in jobs]
        segments = plan_segments(
            [rows] * len(jobs), range(1, len(jobs) + 1), [None, *adapters], [0.5] * (1 + len(jobs))
        )
        return DeviceBatch.of(self.model.tables, segments, tile_rows=16 if rows <= 16 else 64)

    def _forward(
        self,
        tokens: list[int],
        at: torch.Tensor,
        read: torch.Tensor,
        mask: torch.Tensor | None,
        jobs: Sequence[Job],
    ) -> list[int]:
        """Greedy next tokens of the last row of each job."""
        self._fence(jobs)
        self.engine.before_forward()
        logits = self.model.forward(
            torch.tensor(tokens, device=self.device), at.to(self.device), read.to(self.device),
            None if mask is None else mask.to(self.device), self._lora(jobs, len(tokens) // len(jobs)),
            self.engine.wait_layer,
        )  # fmt: skip
        found: list[int] = logits.view(len(jobs), -1, logits.shape[-1])[:, -1].argmax(-1).tolist()
        return found

    def _prefill(self, job: Job) -> None:
        start, end = job.cached, len(job.tokens)
        position = torch.arange(start, end)
        mask = (torch.arange(end)[None, :] <= position[:, None])[None, None]
        slots = job.slots[:end]
        tokens = list(job.tokens[start:])
        job.made = self._forward(tokens, slots[start:], slots[None], mask if start else None, [job])
        job.first = self.now()
        self._insert(job, end)

    def _decode(self) -> None:
        jobs = self.running
        lengths = torch.tensor([len(job.tokens) + len(job.made) for job in jobs])
        read = torch.zeros((len(jobs), int(lengths.max())), dtype=torch.int64)
        for row, job in enumerate(jobs):
            read[row, : lengths[row]] = job.slots[: lengths[row]]
        mask = (torch.arange(read.shape[1])[None, :] < lengths[:, None])[:, None, None]
        written = read.gather(1, lengths[:, None] - 1).flatten()
        tokens = self._forward([job.made[-1] for job in jobs], written, read, mask, jobs)
        for job, token in zip(jobs, tokens, strict=True):
            job.made.append(token)

    def _insert(self, job: Job, end: int) -> None:
        """Its first ``end`` tokens go below its adapter; what is there already takes the place of its own."""
        assert job.lock is not None
        whole = (job.tokens + array("q", job.made))[:end]
        tree = self.manager.tree
        inserted = self.manager.insert(tree.adapter_of(job.lock), whole, None, job.slots[:end].clone(), end)
        if inserted.matched > job.cached:
            self.slots.free_segment(job.slots[job.cached : inserted.matched])
        self.manager.lock(inserted.node)
        self.manager.unlock(job.lock)
        kept = [node.payload for node in tree.path(inserted.node) if node.kind == "kv"]
        job.slots = torch.cat([*kept, job.slots[end:]])
        job.lock, job.cached = inserted.node, end
        self.executor.run(self.manager.collect())

    def _end(self) -> list[Job]:
        ended = [job for job in self.running if len(job.made) >= job.answer]
        for job in ended:
            self.running.remove(job)
            end = len(job.tokens) + len(job.made) - 1  # the last token was never fed to the model
            self._insert(job, end)
            self.slots.free_segment(job.slots[end:])
            assert job.lock is not None
            self.manager.unlock(job.lock)
            self.manager.finished(job.rid, job.lock)
            self.executor.run(self.manager.collect())
            job.ended = self.now()
        return ended

    def leaks(self) -> int:
        """Device slots that nobody has; 0 is right."""
        tree = self.manager.tree
        own = sum(len(job.slots) - job.cached for job in self.running)
        held = tree.evictable_size + tree.protected_size + own
        return self.manager.device_slots - self.slots.available_size() - held
