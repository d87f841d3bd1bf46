"""ELORA's own settings, and how they travel.

They ride on SGLang's ``ServerArgs`` as the bookkeeping attribute ``_elora``, which SGLang's pickling keeps,
so every process reads them with :func:`current`. Two environment variables tell a child process, *before*
it has seen any arguments, whether its launcher runs with ``--elora``.

A new setting is one field here: its flag, its help text and its row in ``docs/flags.md`` follow from it.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elora_sglang.runtime.pool import host_size

ATTRIBUTE = "_elora"
ENV_LAUNCHER = "ELORA_LAUNCHER_PID"
ENV_ENABLED = "ELORA_ENABLED"

#: Parts of ELORA that ``--elora-without`` can switch off, and what goes without them.
TERMS: dict[str, str] = {
    "dependency": "adapters may leave the device while their KV stays",
    "unified": "adapters and KV each keep a fixed share instead of competing",
    "queue-prefetch": "nothing is copied for a request before it is admitted",
    "idle-prefetch": "nothing is copied while the server is idle",
    "backup": "nothing is saved to the host before it has to leave",
    "guard": "what was loaded for a waiting request may leave before it ran",
    "frequency": "the score ignores how often something was used",
    "recency": "the score ignores when something was used last",
    "cost": "the score ignores what bringing something back would cost",
    "pressure": "the score ignores how many adapters the traffic needs at once",
    "ghosts": "use counts are forgotten with what left",
    "hints": "session hints of requests are ignored",
    "predictor": "the learned predictor of return never acts",
}


def _setting(default: Any, description: str, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": description, "choices": choices})


@dataclasses.dataclass(frozen=True)
class EloraConfig:
    """Settings of one server; the defaults describe a stock one. Values are checked on construction."""

    enabled: bool = _setting(
        False, "Keep LoRA adapters and KV caches in one token pool under one tree (ELORA)."
    )
    policy: str = _setting(
        "elora",
        "Eviction policy for KV and adapters together: a file of core/policies/; `-` and `_` are the same.",
    )
    host_memory: str = _setting(
        "auto",
        "Host memory that keeps what leaves the device. `auto`: as much as the device pool has, at most half of the "
        "memory that is available; `N` or `NGB`: gigabytes (10^9 bytes) of this server, over all its ranks; `Nx`: N "
        "times the device pool; `0`: none.",
    )
    busy_watermark: float = _setting(
        0.95, "Share of the device pool in use above which the swapper makes room ahead of need."
    )
    idle_watermark: float = _setting(
        0.70, "Share of the device pool in use below which idle time is used to fetch from the host."
    )
    swap_interval: float = _setting(0.1, "Seconds between two looks of the swapper at the watermarks.")
    lora_share: float = _setting(
        0.2, "Share of the device pool that adapters get under policy `static`; no other policy has one."
    )
    without: str = _setting(
        "",
        "Comma-separated parts to switch off, for measurements: "
        + "; ".join(f"`{name}`: {what}" for name, what in TERMS.items())
        + ".",
    )
    link_gbps: float = _setting(
        0.0,
        "Emulate a link of so many gigabytes (10^9 bytes) per second and direction between host and device, for "
        "measurements on a CPU; 0 switches it off.",
    )
    trace_out: str = _setting(
        "",
        "File to record every event and action of the cache in, one JSON line each; ranks after the first add "
        "`.rankN`.",
    )
    adapter_names: str = _setting(
        "strict",
        "How requests may name an adapter. `strict`: an unknown name is an error and a loaded adapter's bare "
        "name in `model` selects it; `stock`: as SGLang does, which answers some of them from the base model.",
        ("strict", "stock"),
    )

    graph_rank: int = _setting(
        128,
        "On a GPU: the largest LoRA rank that decode CUDA graphs have room for, or that of the largest adapter given "
        "at start-up. An adapter above it that is loaded later is refused.",
    )
    audit_interval: int = _setting(
        0,
        "Audit slot ownership and adapter bytes every so many scheduler iterations and stop the server on a "
        "fault; 0 switches it off. Walks the whole pool: for tests and for hunting a suspicion.",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if isinstance(field.default, float) and type(value) is int:
                value = float(value)
                object.__setattr__(self, field.name, value)
            if type(value) is not type(field.default):
                raise ValueError(
                    f"{flag_of(field.name)}: expected {type(field.default).__name__}, got {value!r}"
                )
            if choices and value not in choices:
                raise ValueError(f"{flag_of(field.name)}: {value!r} is not one of {', '.join(choices)}")
            if not self.enabled and value != field.default:
                raise ValueError(f"{flag_of(field.name)} has no effect without --elora; add --elora")
        object.__setattr__(self, "policy", policy_file(self.policy))
        if self.enabled and self.policy not in policy_names():
            raise ValueError(
                f"{flag_of('policy')}: {self.policy!r} is not one of {', '.join(policy_names())}"
            )
        self._check_numbers()
        host_size.parse(self.host_memory)
        unknown = sorted(self.without_terms - set(TERMS))
        if unknown:
            raise ValueError(f"{flag_of('without')}: {unknown[0]!r} is not one of {', '.join(TERMS)}")
        if self.trace_out and not Path(self.trace_out).expanduser().absolute().parent.is_dir():
            raise ValueError(f"{flag_of('trace_out')}: the folder of {self.trace_out!r} does not exist")

    def _check_numbers(self) -> None:
        busy, idle = self.busy_watermark, self.idle_watermark
        for name, good, rule in (
            ("graph_rank", self.graph_rank >= 1, "must be at least 1"),
            ("audit_interval", self.audit_interval >= 0, "must not be negative"),
            ("busy_watermark", 0 < busy <= 1, "must be above 0 and at most 1"),
            ("idle_watermark", 0 <= idle <= 1, "must be between 0 and 1"),
            ("idle_watermark", idle <= busy, f"must not be above {flag_of('busy_watermark')} ({busy})"),
            ("swap_interval", 0 < self.swap_interval < math.inf, "must be a positive number of seconds"),
            ("lora_share", 0 < self.lora_share < 1, "must be above 0 and below 1"),
            ("link_gbps", 0 <= self.link_gbps < math.inf, "must be 0 or a positive number"),
        ):
            if not good:
                raise ValueError(f"{flag_of(name)}: {getattr(self, name)} {rule}")

    @property
    def without_terms(self) -> frozenset[str]:
        """The parts that :attr:`without` names: keys of :data:`TERMS`."""
        return frozenset(term.strip() for term in self.without.split(",") if term.strip())


def policy_names() -> tuple[str, ...]:
    """Names of the eviction policies that are installed, sorted."""
    from elora_sglang.core import policies

    return tuple(policies.policy_names())


def policy_file(name: str) -> str:
    """A policy's name as its file spells it: ``paper-literal`` is ``paper_literal``."""
    return name.replace("-", "_")


def flag_of(field_name: str) -> str:
    """Command-line flag of a field: ``enabled`` → ``--elora``, ``policy`` → ``--elora-policy``."""
    return "--elora" if field_name == "enabled" else f"--elora-{field_name.replace('_', '-')}"


def destination_of(field_name: str) -> str:
    """Keyword of a field in ``sglang.Engine(...)`` and in argparse: ``elora``, ``elora_policy``."""
    return flag_of(field_name).removeprefix("--").replace("-", "_")


def from_keywords(values: Mapping[str, Any]) -> EloraConfig:
    """Config from ``elora=…, elora_policy=…``; missing or ``None`` means the default. Raises ValueError."""
    known = {destination_of(f.name): f.name for f in dataclasses.fields(EloraConfig)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown ELORA setting {unknown[0]!r}; known are {', '.join(sorted(known))}")
    return EloraConfig(**{known[k]: v for k, v in values.items() if v is not None})


def attach(server_args: Any, config: EloraConfig) -> None:
    """Put the config on the server arguments. Mutates ``server_args`` and this process's environment."""
    setattr(server_args, ATTRIBUTE, config)
    os.environ[ENV_ENABLED] = "1" if config.enabled else "0"


def current(server_args: Any) -> EloraConfig:
    """The config that came with these server arguments; a disabled one when none did."""
    config = getattr(server_args, ATTRIBUTE, None)
    return config if isinstance(config, EloraConfig) else EloraConfig()


def announce_launcher() -> bool:
    """Say in the environment that children belong to this process; True when this one is such a child.

    A child is a process that ``multiprocessing`` started for a process which had announced itself; a
    server started as a command of its own inherits the variables, too, but is no child.
    """
    parent = multiprocessing.parent_process()
    child = parent is not None and os.environ.get(ENV_LAUNCHER) == str(parent.pid)
    os.environ[ENV_LAUNCHER] = str(os.getpid())
    if not child:
        os.environ[ENV_ENABLED] = "0"
    return child


def launcher_enabled() -> bool:
    """Whether the launcher of this child process runs with ``--elora``."""
    return os.environ.get(ENV_ENABLED) == "1"
