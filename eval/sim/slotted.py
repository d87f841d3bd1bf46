"""Adapters in a fixed number of slot buffers beside the KV pool: stock SGLang, HiCache, vLLM in simulated time.

KV lives below its adapter in a tree of its own, evicted without regard to adapters. It is the same tree with adapters
that weigh nothing and are always there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from elora_sglang.core.admission import Ask
from elora_sglang.core.swapper import SwapSettings
from elora_sglang.core.tree.node import Node
from elora_sglang.eval.sim.cache import Admitted, Refused, Setting
from elora_sglang.eval.sim.unified import UnifiedCache

if TYPE_CHECKING:
    from elora_sglang.eval.sim.requests import Request


class SlottedCache(UnifiedCache):
    """``slots`` buffers of the largest rank for adapters, least recently used out; the rest of the device for KV.

    Adapters have copies in host memory of their own, beside the host tier of KV, as in the systems this stands for;
    what does not fit there is read from its file again, least recently used out.

    Args:
        setting: the device memory is for buffers and KV, the host memory for KV alone.
        settings: of the swapper.
        adapter_host_slots: host memory for copies of adapters.
        slots: adapter buffers; as many adapters can run at once.
        overlap: loads go on while others run, and a request waits for its own; else the batch waits for them.
    """

    def __init__(
        self, setting: Setting, *, settings: SwapSettings, adapter_host_slots: int, slots: int, overlap: bool
    ) -> None:
        self._slots, self._overlap = slots, overlap
        self._buffers = slots * setting.buffer_size() if setting.adapters else 0
        kv_slots = setting.device_slots - self._buffers
        if kv_slots < 1:
            raise ValueError(
                f"{slots} buffers of {setting.buffer_size()} slots leave none of {setting.device_slots} for KV"
            )
        self._sizes = setting.adapter_sizes()
        #: Adapters in buffers: when they were last used, oldest first; and how many requests use each.
        self._there: dict[str, float] = {}
        self._users: dict[str, int] = {}
        self._loading: dict[str, float] = {}
        #: Adapters with a copy in host memory, least recently loaded first, and what they take.
        self._copies: dict[str, int] = {}
        self._copied, self._most_copied = 0, adapter_host_slots
        for name, size in self._sizes.items():
            if self._copied + size <= adapter_host_slots:
                self._copies[name] = size
                self._copied += size
        super().__init__(replace(setting, device_slots=kv_slots), policy="lru", settings=settings)

    def place_adapters(self, setting: Setting) -> None:
        """They take nothing in the KV pool."""
        for name in setting.adapters:
            node = self.manager.register(name, 0, pinned=True)
            self.manager.make_resident(node, 0)
            if setting.host_slots:
                self.manager.place_on_host(node, 0)

    @property
    def passing(self) -> bool:
        """Nobody passes anybody but for an adapter on its way."""
        return False

    def consider(self, req: Request, ask: Ask) -> bool:
        """Queue order; with overlap, a request waits for its adapter while others run."""
        if ask.alone or req.adapter is None or not self._overlap:
            return True
        if req.adapter not in self._there and not self._start_loading(req.adapter):
            return False
        return self._loading.get(req.adapter, 0.0) <= self.now

    def admit(self, req: Request, ask: Ask) -> Admitted | Refused:
        """A buffer and room for its tokens, or it waits."""
        if req.adapter is not None and req.adapter not in self._there and self._victim() is None:
            return Refused()
        found = super().admit(req, ask)
        if isinstance(found, Refused) or req.adapter is None:
            return found
        name = req.adapter
        at_hand = name in self._there and name not in req.cache
        req.adapter_tier = "device" if at_hand and not self._came_for(name, req) else "host"
        if name not in self._there:
            self._start_loading(name)
        self._there[name] = self._there.pop(name, 0.0)
        self._users[name] = self._users.get(name, 0) + 1
        arrives = self._loading.get(name, 0.0)
        if arrives > self.now and not self._overlap:
            found.blocking_s = max(found.blocking_s, arrives - self.now)
        if req.adapter_tier == "host":
            req.restore_s += self.costs.load_s(self._sizes[name])
        return found

    def _came_for(self, name: str, req: Request) -> bool:
        """Whether its buffer was filled after ``req`` had arrived, and nobody has used it yet."""
        return self._there[name] > req.arrived and not self._users.get(name)

    def _victim(self) -> str | None:
        """The buffer to fill next: an empty one (``""``), or the least recently used that nobody uses.

        What is on its way stays (SGLang's overlap loader counts it as used); what has come may go before it was used.
        """
        if len(self._there) < self._slots:
            return ""
        for name in self._there:
            if not self._users.get(name) and self._loading.get(name, 0.0) <= self.now:
                return name
        return None

    def _start_loading(self, name: str) -> bool:
        victim = self._victim()
        if victim is None:
            return False
        if victim:
            del self._there[victim]
            self._loading.pop(victim, None)
        size = self._sizes[name] * self.costs.slot_bytes
        read = self.now if self._copy(name) else self.disk.start(self.now, size)
        arrives = self.loads.start(read, size) + self.machine.slot_load_s
        self.loads.free_at = arrives  # stock's loads go one after the other, copies and all
        self._loading[name] = arrives
        self._there[name] = self.now
        return True

    def _copy(self, name: str) -> bool:
        """Whether host memory had a copy of the adapter; it has one from now on, if it can."""
        size = self._copies.pop(name, 0)
        had, size = bool(size), size or self._sizes[name]
        if not had:
            while self._copies and self._copied + size > self._most_copied:
                self._copied -= self._copies.pop(next(iter(self._copies)))
            self._copied += size
        self._copies[name] = size
        return had

    @property
    def active(self) -> bool:
        """Whether copies are in flight."""
        return super().active or any(ends > self.now for ends in self._loading.values())

    def next_event(self) -> float | None:
        """When a copy ends, of KV or of an adapter."""
        times = [ends for ends in self._loading.values() if ends > self.now]
        kv = super().next_event()
        return min([*times, *([] if kv is None else [kv])], default=None)

    def end(self, req: Request, *, finished: bool) -> None:
        """Its buffer may go to another adapter."""
        if req.adapter is not None:
            self._users[req.adapter] -= 1
        super().end(req, finished=finished)

    def _restore(self, req: Request, device: int, host: int, adapter: Node) -> float:
        req.adapter_tier = "base"  # adapters are counted by :meth:`admit`
        return super()._restore(req, device, host, adapter)

    def resident_adapters(self) -> list[str]:
        """Names of the adapters in buffers."""
        return sorted(self._there)

    def usage(self) -> dict[str, int]:
        """As there, with what the buffers hold; ``free`` includes what they waste."""
        found = super().usage()
        used = sum(self._sizes[name] for name in self._there)
        found["adapters"] = used
        found["free"] += self._buffers - used
        found["invalid"] = sum(
            n.size
            for n in self.tree.kv_nodes()
            if n.resident and n.adapter is not None and n.adapter.key and n.adapter.key not in self._there
        )
        return found

    def audit(self) -> None:
        """As there; and no buffer was given twice, or is still in use."""
        super().audit()
        if len(self._there) > self._slots or any(self._users.values()):
            raise AssertionError(f"{len(self._there)} adapters in {self._slots} buffers, used: {self._users}")
