"""ELORA's own settings, and how they travel.

They ride on SGLang's ``ServerArgs`` as the bookkeeping attribute ``_elora``, which SGLang's pickling keeps,
so every process reads them with :func:`current`. Two environment variables tell a child process, *before*
it has seen any arguments, whether its launcher runs with ``--elora``.

A new setting is one field here: its flag, its help text and its row in ``docs/flags.md`` follow from it.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pkgutil
from collections.abc import Mapping
from typing import Any

ATTRIBUTE = "_elora"
ENV_LAUNCHER = "ELORA_LAUNCHER_PID"
ENV_ENABLED = "ELORA_ENABLED"


def _setting(default: Any, description: str, choices: tuple[str, ...] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": description, "choices": choices})


@dataclasses.dataclass(frozen=True)
class EloraConfig:
    """Settings of one server; the defaults describe a stock one. Values are checked on construction."""

    enabled: bool = _setting(
        False, "Keep LoRA adapters and KV caches in one token pool under one tree (ELORA)."
    )
    policy: str = _setting("lru", "Eviction policy for KV and adapters together: a file of core/policies/.")
    adapter_names: str = _setting(
        "strict",
        "How requests may name an adapter. `strict`: an unknown name is an error and a loaded adapter's bare "
        "name in `model` selects it; `stock`: as SGLang does, which answers some of them from the base model.",
        ("strict", "stock"),
    )

    audit_interval: int = _setting(
        0,
        "Audit slot ownership and adapter bytes every so many scheduler iterations and stop the server on a "
        "fault; 0 switches it off. Walks the whole pool: for tests and for hunting a suspicion.",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            if type(value) is not type(field.default):
                raise ValueError(
                    f"{flag_of(field.name)}: expected {type(field.default).__name__}, got {value!r}"
                )
            if choices and value not in choices:
                raise ValueError(f"{flag_of(field.name)}: {value!r} is not one of {', '.join(choices)}")
            if not self.enabled and value != field.default:
                raise ValueError(f"{flag_of(field.name)} has no effect without --elora; add --elora")
        if self.enabled and self.policy not in policy_names():
            raise ValueError(
                f"{flag_of('policy')}: {self.policy!r} is not one of {', '.join(policy_names())}"
            )


def policy_names() -> tuple[str, ...]:
    """Names of the eviction policies that are installed, sorted."""
    from elora_sglang.core import policies

    return tuple(sorted(m.name for m in pkgutil.iter_modules(policies.__path__) if m.name[0] != "_"))


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
