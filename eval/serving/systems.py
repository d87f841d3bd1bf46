"""The systems of a live comparison: the same bytes on the device and on the host for each, and its server's flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from elora_sglang.eval.baselines import ENV_LINK, LAUNCH
from elora_sglang.eval.serving import model

STOCK = ("stock", "stock-overlap", "hicache")
ELORA = ("static", "lru", "paper", "elora", "elora+hints")
NAMES = STOCK + ELORA
#: Shares of the device memory that the tuning pass gives to adapters: as slot buffers, or as ``static``'s share.
SHARES, QUICK_SHARES = (0.2, 0.35, 0.5), (0.3, 0.5)
HICACHE_HOOKS = ("hicache_streams", "hicache_memory", "hicache_load", "hicache_save")
RECORD_HOOKS = tuple(
    f"record_{name}"
    for name in ("match", "insert", "lock", "unlock", "evict", "evict_host", "backup", "load_back", "reset")
)
BASELINE_HOOKS = ("adapter_copy", "overlap_loader", "report", *HICACHE_HOOKS, *RECORD_HOOKS)


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


def sweep(name: str, budget: Budget, *, quick: bool) -> tuple[float, ...]:
    """What the tuning pass tries: slots for stock and HiCache, the adapters' share for ``static``, else nothing."""
    shares = QUICK_SHARES if quick else SHARES
    if name == "static":
        return shares[-1:] if quick else shares
    if name not in STOCK:
        return ()
    slots = (round(s * budget.device_tokens * model.KV_BYTES_PER_TOKEN / budget.slot_bytes) for s in shares)
    return tuple(sorted({max(1, count) for count in slots}))


def kv_tokens_of_stock(budget: Budget, slots: int) -> int:
    """KV tokens left beside so many slot buffers of the largest rank. Raises ValueError when none are."""
    left = budget.device_tokens - -(-slots * budget.slot_bytes // model.KV_BYTES_PER_TOKEN)
    if left < 2048:
        raise ValueError(
            f"{slots} slots leave {left} of {budget.device_tokens} tokens: give --device-tokens more"
        )
    return left


def paths(folder: Path, adapters: int) -> list[str]:
    """``NAME=PATH`` of every adapter."""
    return [f"{model.name(i)}={folder / 'adapters' / model.name(i)}" for i in range(adapters)]


def common(budget: Budget) -> list[str]:
    """Flags that all systems have.

    Without the overlap schedule: on a CPU launching a batch is computing it, so a result would be handled only after
    the *next* batch was computed, a whole decode step late, where a GPU loses nothing.
    """
    running = ("--max-running-requests", str(budget.running))
    return ["--enable-lora", "--dtype", "float32", "--disable-overlap-schedule", *running]


def make(
    name: str,
    setting: float | None,
    budget: Budget,
    folder: Path,
    link_gbps: float,
    without: Sequence[str] = (),
) -> System:
    """The server of a system. Raises ValueError for an unknown name or a setting that does not fit."""
    adapters = paths(folder, budget.adapters)
    if name in STOCK:
        return _stock(name, int(setting or sweep(name, budget, quick=True)[0]), budget, adapters, link_gbps)
    if name not in ELORA:
        raise ValueError(f"no system {name!r}; known are {', '.join(NAMES)}")
    flags = [
        *common(budget),
        *("--elora", "--elora-policy", name.partition("+")[0]),
        *("--max-total-tokens", str(budget.device_tokens)),
        *("--elora-host-memory", f"{budget.host_tokens * model.KV_BYTES_PER_TOKEN / 1e9:.6f}GB"),
        *("--elora-link-gbps", f"{link_gbps:.6f}"),
    ]
    if name == "static":
        setting = setting or SHARES[0]
        flags += ["--elora-lora-share", str(setting)]
    if without:
        flags += ["--elora-without", ",".join(without)]
    return System(name, setting, (*flags, "--lora-paths", *adapters))


def _stock(name: str, slots: int, budget: Budget, adapters: list[str], link_gbps: float) -> System:
    flags = [
        *common(budget),
        *("--lora-backend", "torch_native", "--max-loras-per-batch", str(slots)),
        *("--max-lora-rank", str(max(budget.ranks))),
        *("--max-total-tokens", str(kv_tokens_of_stock(budget, slots))),
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
        ratio = host / kv_tokens_of_stock(budget, slots)
        flags += ["--enable-hierarchical-cache", "--hicache-ratio", f"{ratio:.4f}"]
        flags += ["--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"]
    return System(
        name,
        slots,
        (*flags, "--lora-paths", *adapters),
        {ENV_LINK: f"{link_gbps:.6f}"},
        tuple(late),
        LAUNCH,
    )


def require_hooks(system: System, info: dict, budget: Budget, link_gbps: float) -> None:
    """Refuse a server that does not report what the comparison put into it.

    Raises:
        RuntimeError: a baseline whose hooks are not in place, another link than asked for, or slot buffers of
            another size than was counted.
    """
    state = info["internal_states"][0]
    if system.name in STOCK:
        report = state.get("baseline")
        if report is None:
            raise RuntimeError(
                f"{system.key}: no baseline hooks in this server; it would get its copies for free"
            )
        missing = sorted({f"baseline_{hook}" for hook in BASELINE_HOOKS} - set(report["hooks"]))
        if missing:
            raise RuntimeError(f"{system.key}: hooks not in place: {', '.join(missing)}")
        counted = int(system.setting or 0) * budget.slot_bytes
        if report.get("slot_buffer_bytes") != counted:
            raise RuntimeError(
                f"{system.key}: slot buffers hold {report.get('slot_buffer_bytes')} bytes, counted were {counted}"
            )
        seen = float(report["link_gbps"])
    else:
        if "elora" not in state:
            raise RuntimeError(f"{system.key}: the server does not report that it runs with --elora")
        if "link_gbps" not in state["elora"]:
            raise RuntimeError(f"{system.key}: the server reports no host tier, hence no link")
        seen = float(state["elora"]["link_gbps"])
    if abs(seen - link_gbps) > 1e-5:
        raise RuntimeError(f"{system.key}: its link has {seen} GB/s, the comparison's {link_gbps}")
