"""The systems that a simulation compares, by name; what each stands for is said in its line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from elora_sglang.core.policies import policy_names
from elora_sglang.core.policies.base import Policy
from elora_sglang.core.swapper import SwapSettings, switches
from elora_sglang.eval.sim.cache import Setting
from elora_sglang.eval.sim.slotted import SlottedCache
from elora_sglang.eval.sim.unified import UnifiedCache
from elora_sglang.integration.plugin.config import TERMS

CLAIRVOYANT = "clairvoyant"
#: Share of the memory that a static split gives to adapters.
SPLIT = 0.2
#: What names of ablations begin with.
WITHOUT = "elora-without-"


@dataclass(frozen=True)
class System:
    """One way to serve.

    Attributes:
        name: as chosen on the command line.
        line: what it stands for.
        build: its cache.
        knob: what a sweep tunes (``slots`` or ``lora_share``), if anything.
    """

    name: str
    line: str
    build: Callable[..., UnifiedCache]
    knob: str | None = None
    fixed: dict[str, Any] = field(default_factory=dict)

    def cache(self, setting: Setting, **knobs: Any) -> UnifiedCache:
        """A fresh cache. Raises ValueError where the knobs leave no memory for KV."""
        return self.build(setting, **self.fixed, **knobs)

    def choices(self, setting: Setting) -> list[dict[str, Any]]:
        """The values that its knob is tuned over, one empty choice where it has none; none where nothing fits."""
        if self.knob is None:
            return [{}]
        values = slot_counts(setting) if self.knob == "slots" else LORA_SHARES
        return [{self.knob: value} for value in values]


#: Nothing moves but what a request that is being admitted needs, and new KV to the host.
_ON_DEMAND: dict[str, Any] = {
    "queue_prefetch": False,
    "idle_prefetch": False,
    "guard": False,
    "busy_watermark": 1.0,
}


def _unified(
    setting: Setting, *, policy: str | Policy, history: bool = True, without: str = "", **settings: Any
) -> UnifiedCache:
    chosen = SwapSettings(
        host_slots=setting.host_slots, **{**switches(frozenset({without} - {""})), **settings}
    )
    return UnifiedCache(setting, policy=policy, settings=chosen, history=history)


def _slotted(
    setting: Setting, *, host: bool, overlap: bool, slots: int | None = None, share: float = 0.0
) -> SlottedCache:
    used = slots if slots is not None else slot_counts(setting)[0]
    if share:
        used = max(int(share * setting.device_slots // setting.buffer_size()), 1)
    adapters = sum(setting.adapter_sizes().values())
    # Their adapters have copies in host memory as well: the same bytes for all.
    host_slots = max(setting.host_slots - adapters, 0) if host else 0
    copies = min(adapters, setting.host_slots) if setting.host_slots else adapters
    settings = SwapSettings(host_slots=host_slots, **_ON_DEMAND)
    split = replace(setting, host_slots=host_slots)
    return SlottedCache(split, settings=settings, adapter_host_slots=copies, slots=used, overlap=overlap)


def slot_counts(setting: Setting) -> list[int]:
    """Numbers of buffers that a sweep tries: powers of two between all adapters and none, that leave room for KV."""
    most = min(len(setting.adapters), int(0.9 * setting.device_slots // setting.buffer_size()))
    return sorted({most, *(2**power for power in range(2, 64) if 2**power < most)} - {0})


#: Shares of the device for adapters that a sweep tries.
LORA_SHARES = (0.05, 0.1, 0.2, 0.35, 0.5)
#: What stands for a system with slot buffers, whether it has a host tier for KV, and whether loads overlap.
_SLOTTED: dict[str, tuple[str, bool, bool]] = {
    "stock": ("SGLang as released: buffers of the largest rank, batches wait for loads, no host KV", False, False),
    "stock-overlap": ("SGLang with --enable-lora-overlap-loading: loads beside running batches", False, True),
    "hicache": (
        "SGLang with --enable-hierarchical-cache and overlap loading: KV to the host and back at admission", True, True,
    ),
    "vllm": ("vLLM-like: max_loras buffers, both LRU, batches wait for loads, no offload", False, False),
    "vllm-offload": (
        "vLLM-like with KV offload to host memory, fetched when a request is admitted", True, False,
    ),
}  # fmt: skip


def systems() -> dict[str, System]:
    """All by name: baselines, then every policy over the unified pool."""
    found: dict[str, System] = {}
    for name, (line, host, overlap) in _SLOTTED.items():
        found[name] = System(name, line, _slotted, "slots", {"host": host, "overlap": overlap})
    found["vllm-split"] = System(
        "vllm-split",
        f"vLLM-like and not tuned: a fixed {SPLIT:.0%} of the memory for buffers, as the paper's control",
        _slotted,
        fixed={"host": False, "overlap": False, "share": SPLIT},
    )
    found["s-lora"] = System(
        "s-lora",
        "S-LoRA-like: one pool, adapters from the host as the queue needs them, KV ends with its request",
        _unified,
        fixed={"policy": "lru", "history": False, "idle_prefetch": False, "busy_watermark": 1.0},
    )
    for name in policy_names():
        public = name.replace("_", "-")
        knob = "lora_share" if public == "static" else None
        line = f"ELORA's pool, tree and swapper with policy {public}"
        found[public] = System(public, line, _unified, knob, {"policy": public})
    for term, line in TERMS.items():
        name = f"{WITHOUT}{term}"
        found[name] = System(name, f"elora, but {line}", _unified, fixed={"policy": "elora", "without": term})
    found[CLAIRVOYANT] = System(
        CLAIRVOYANT,
        "knows the future: evicts leaves by next use and cost, a reference and no bound",
        _unified,
    )
    return found
