"""The servers that are compared live: the same bytes on the device and on the host for each, and each one's flags."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elora_sglang.eval.baselines import ENV_LINK, LAUNCH
from elora_sglang.eval.baselines.patches import PATCHES
from elora_sglang.eval.serving import evaluation_model as model

STOCK = ("stock", "stock-overlap", "hicache")
ELORA = ("static", "lru", "paper", "elora", "elora+hints")
NAMES = STOCK + ELORA
#: Shares of the device memory that the tuning pass gives to adapters: as slot buffers, or as ``static``'s share.
SHARES, QUICK_SHARES = (0.2, 0.35, 0.5), (0.3, 0.5)


@dataclass(frozen=True)
class Budget:
    """What every system gets: device and host memory in KV tokens, requests at once, adapters of the traffic."""

    device_tokens: int
    host_tokens: int
    running: int
    adapters: int
    ranks: tuple[int, ...] = model.RANKS

    @property
    def slot_bytes(self) -> int:
        """One of stock's slot buffers: every slot has room for the largest rank."""
        return model.adapter_bytes(max(self.ranks))

    @property
    def adapters_bytes(self) -> int:
        """All adapters, as SGLang keeps them in CPU memory."""
        return sum(model.adapter_bytes(model.rank(i, self.ranks)) for i in range(self.adapters))

    def kv_tokens_beside(self, slots: int) -> int:
        """KV tokens left beside so many slot buffers of the largest rank. Raises ValueError when none are."""
        left = self.device_tokens - -(-slots * self.slot_bytes // model.KV_BYTES_PER_TOKEN)
        if left < 2048:
            raise ValueError(
                f"{slots} slots leave {left} of {self.device_tokens} tokens: give --device-tokens more"
            )
        return left


@dataclass(frozen=True)
class System:
    """One server to start. ``setting``: slots or share, None where there is nothing to set."""

    name: str
    setting: float | None
    flags: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    late_adapters: tuple[str, ...] = ()  # NAME=PATH, registered after the start
    module: str = "sglang.launch_server"

    @property
    def key(self) -> str:
        """Name and setting, as in file names."""
        return self.name if self.setting is None else f"{self.name}@{self.setting:g}"


def candidates(name: str, budget: Budget, *, quick: bool) -> tuple[float, ...]:
    """What the tuning pass tries: slots for stock and HiCache, the adapters' share for ``static``, else nothing."""
    shares = QUICK_SHARES if quick else SHARES
    if name == "static":
        return shares[-1:] if quick else shares
    if name not in STOCK:
        return ()
    slots = (round(s * budget.device_tokens * model.KV_BYTES_PER_TOKEN / budget.slot_bytes) for s in shares)
    return tuple(sorted({max(1, count) for count in slots}))


def system(
    name: str,
    setting: float | None,
    budget: Budget,
    folder: Path,
    link_gbps: float,
    without: Sequence[str] = (),
) -> System:
    """The server of a system. Raises ValueError for an unknown name or a setting that does not fit.

    Without the overlap schedule: on a CPU launching a batch is computing it, so a result would be handled only after
    the *next* batch was computed, a whole decode step late, where a GPU loses nothing.
    """
    adapters = [f"{one}={folder / 'adapters' / one}" for one in model.names(budget.adapters)]
    flags = ["--enable-lora", "--dtype", "float32", "--disable-overlap-schedule"]
    flags += ["--max-running-requests", str(budget.running)]
    if name in STOCK:
        slots = int(setting or candidates(name, budget, quick=True)[0])
        return _stock(name, slots, budget, flags, adapters, link_gbps)
    if name not in ELORA:
        raise ValueError(f"no system {name!r}; known are {', '.join(NAMES)}")
    flags += [
        *("--elora", "--elora-policy", name.partition("+")[0]),
        *("--max-total-tokens", str(budget.device_tokens)),
        *("--elora-host-memory", f"{budget.host_tokens * model.KV_BYTES_PER_TOKEN / 1e9:.6f}GB"),
        *("--elora-link-gbps", f"{link_gbps:.6f}"),
    ]
    if name == "static":
        setting = setting or SHARES[0]
        flags += ["--elora-lora-share", str(setting)]
    if without:
        name = f"{name}-without-{'-'.join(without)}"
        flags += ["--elora-without", ",".join(without)]
    return System(name, setting, (*flags, "--lora-paths", *adapters))


def _stock(
    name: str, slots: int, budget: Budget, common: list[str], adapters: list[str], link_gbps: float
) -> System:
    flags = [
        *common,
        *("--lora-backend", "torch_native", "--max-loras-per-batch", str(slots)),
        *("--max-lora-rank", str(max(budget.ranks))),
        *("--max-total-tokens", str(budget.kv_tokens_beside(slots))),
        "--enable-cache-report",
    ]
    late: list[str] = []
    if name == "stock-overlap":
        # SGLang pins what it keeps for overlapped loading, and allows two adapters a slot; the others come from disk.
        loaded = 2 * slots
        adapters, late = adapters[:loaded], adapters[loaded:]
        flags += ["--enable-lora-overlap-loading", "--max-loaded-loras", str(loaded)]
    if name == "hicache":
        host = budget.host_tokens - budget.adapters_bytes // model.KV_BYTES_PER_TOKEN
        if host < 1024:
            raise ValueError(f"the adapters leave {host} host tokens for HiCache: give --host-tokens more")
        ratio = host / budget.kv_tokens_beside(slots)
        flags += ["--enable-hierarchical-cache", "--hicache-ratio", f"{ratio:.4f}"]
        flags += ["--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"]
    env = {ENV_LINK: f"{link_gbps:.6f}"}
    return System(name, slots, (*flags, "--lora-paths", *adapters), env, tuple(late), LAUNCH)


def require_hooks(system: System, info: dict[str, Any], budget: Budget, link_gbps: float) -> None:
    """Refuse a server that does not report what the comparison put into it.

    Raises:
        RuntimeError: a baseline whose hooks are not in place, another link than asked for, or slot buffers of
            another size than was counted.
    """

    def refuse(why: str) -> RuntimeError:
        return RuntimeError(f"{system.key}: {why}")

    state = info["internal_states"][0]
    if system.name in STOCK:
        report = state.get("baseline")
        if report is None:
            raise refuse("no baseline hooks in this server; it would get its copies for free")
        missing = sorted({patch.name for patch in PATCHES} - set(report["hooks"]))
        if missing:
            raise refuse(f"hooks not in place: {', '.join(missing)}")
        found, counted = report.get("slot_buffer_bytes"), int(system.setting or 0) * budget.slot_bytes
        if found != counted:
            raise refuse(f"slot buffers hold {found} bytes, counted were {counted}")
    else:
        if "elora" not in state:
            raise refuse("the server does not report that it runs with --elora")
        report = state["elora"]
        if "link_gbps" not in report:
            raise refuse("the server reports no host tier, hence no link")
    seen = float(report["link_gbps"])
    if abs(seen - link_gbps) > 1e-5:
        raise refuse(f"its link has {seen} GB/s, the comparison's {link_gbps}")


def adapters_for_stock(adapters: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """The adapters by name, rsLoRA ones replaced by copies below ``folder`` with the same scaling.

    SGLang 0.5.23 ignores ``use_rslora`` and scales by ``alpha / r`` (``lora/lora.py``) instead of
    ``alpha / sqrt(r)``; a copy with ``alpha * sqrt(r)`` and without the flag means the same to everybody.

    Raises:
        ValueError: the scaled alpha is not a whole number, so that the copy would not be exact.
    """
    found: dict[str, Path] = {}
    for name, path in adapters.items():
        config = json.loads((path / "adapter_config.json").read_text())
        found[name] = path
        if not config.get("use_rslora"):
            continue
        alpha = config["lora_alpha"] * math.sqrt(config["r"])
        if alpha != round(alpha):
            raise ValueError(
                f"{path}: alpha {config['lora_alpha']} cannot be rescaled exactly for rank {config['r']}"
            )
        found[name] = folder / name
        shutil.copytree(path, found[name])
        config.update(lora_alpha=round(alpha), use_rslora=False)
        (found[name] / "adapter_config.json").write_text(json.dumps(config))
    return found
