"""Every LoRA flag of SGLang under ``--elora``: honoured, ignored with a warning, or refused.

One row per field of SGLang's ``lora`` argument group; the same table sets the values, prints the warnings and
generates ``docs/flags.md``, so the page cannot say something else than the server does.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)

#: What SGLang is told as the highest LoRA rank. It sizes nothing but shapes without memory.
ANY_LORA_RANK = 4096

#: SGLang never runs more requests at once than this when --max-running-requests is not given
#: (``mem_cache/kv_cache_configurator.py``, ``resolve_max_num_reqs``).
MOST_RUNNING_REQUESTS = 4096


class Verdict(enum.Enum):
    HONOURED = "honoured"
    IGNORED = "ignored with a warning"
    REFUSED = "refused"


@dataclasses.dataclass(frozen=True)
class LoraFlag:
    """One field of SGLang's LoRA arguments.

    Args:
        field: name in ``ServerArgs``.
        verdict: what happens to a value that the user gives.
        effect: one sentence for the docs.
        value: what ELORA declares for it, from the arguments; ``None``: the user's value stays.
    """

    field: str
    verdict: Verdict
    effect: str
    value: Callable[[Any], Any] | None = None

    @property
    def flag(self) -> str:
        return f"--{self.field.replace('_', '-')}"


def _most_adapters_per_batch(args: Any) -> int:
    return (args.max_running_requests or MOST_RUNNING_REQUESTS) + 1


LORA_FLAGS: tuple[LoraFlag, ...] = (
    LoraFlag(
        "enable_lora",
        Verdict.HONOURED,
        "implied by `--elora`; set to False (`sglang.Engine(enable_lora=False)`) it is refused.",
        lambda args: True,
    ),
    LoraFlag(
        "enable_lora_overlap_loading",
        Verdict.IGNORED,
        "an adapter is loaded when its first request is admitted; there is no separate loader to overlap with.",
        lambda args: False,
    ),
    LoraFlag(
        "max_lora_rank",
        Verdict.IGNORED,
        "LoRA ranks mix freely, and nothing is padded to a maximum; no adapter is refused for its rank, but on a GPU "
        "with CUDA graphs above `--elora-graph-rank`.",
        lambda args: ANY_LORA_RANK,
    ),
    LoraFlag(
        "lora_target_modules",
        Verdict.HONOURED,
        "not needed: the default, `all`, means every linear layer of the model. `embed_tokens` and `lm_head` are "
        "refused; stock's `all` includes them.",
        lambda args: set(args.lora_target_modules or ["all"]),
    ),
    LoraFlag("lora_paths", Verdict.HONOURED, "adapters to load at start-up; `pinned` keeps its meaning."),
    LoraFlag(
        "max_loaded_loras",
        Verdict.IGNORED,
        "stock unloads the least recently used adapter for good when the limit is reached; ELORA evicts adapters "
        "from the pool and brings them back, and unloads none by itself.",
        lambda args: None,
    ),
    LoraFlag(
        "max_loras_per_batch",
        Verdict.IGNORED,
        "follows the limit on running requests, plus one for the base model. It is no memory knob any more: as many "
        "adapters run in one batch as fit in the pool.",
        _most_adapters_per_batch,
    ),
    LoraFlag(
        "lora_eviction_policy",
        Verdict.IGNORED,
        "adapters and KV leave under one policy: `--elora-policy`.",
        lambda args: "lru",
    ),
    LoraFlag(
        "lora_backend",
        Verdict.IGNORED,
        "`elora`, which reads adapters from slots of the KV pool; no other backend can.",
        lambda args: "elora",
    ),
    LoraFlag(
        "max_lora_chunk_size",
        Verdict.IGNORED,
        "belongs to the backend `csgmv`.",
        lambda args: 16,
    ),
    LoraFlag(
        "experts_shared_outer_loras", Verdict.REFUSED, "LoRA on mixture-of-experts models is not supported."
    ),
    LoraFlag(
        "lora_use_virtual_experts", Verdict.REFUSED, "LoRA on mixture-of-experts models is not supported."
    ),
    LoraFlag(
        "lora_strict_loading",
        Verdict.HONOURED,
        "always on: an adapter with unknown or missing weights is an error that names the file, with or without it.",
        lambda args: True,
    ),
    LoraFlag(
        "lora_drain_wait_threshold",
        Verdict.IGNORED,
        "there are no slots to drain; admission bounds how long others may pass one that waits for room.",
        lambda args: 0.0,
    ),
)


def implied_values(args: Any) -> dict[str, Any]:
    """What ELORA declares for SGLang's LoRA fields, from the server arguments. Changes nothing."""
    return {row.field: row.value(args) for row in LORA_FLAGS if row.value is not None}


def warnings(args: Any, defaults: Any) -> list[str]:
    """One line for each ignored flag that the user set to something other than its default."""
    implied = implied_values(args)
    return [
        f"{row.flag} is ignored with --elora: {row.effect}"
        for row in LORA_FLAGS
        if row.verdict is Verdict.IGNORED
        and getattr(args, row.field) not in (getattr(defaults, row.field), implied[row.field])
    ]


def linear_modules(base_model: Any, target_modules: Any) -> Any:
    """The modules that adapters may target; ``all``, or nothing, means the linear modules of the model.

    Stock's ``all`` adds the embedding and lm_head, for which there is no place in the KV pool. Mutates nothing.
    """
    from sglang.srt.lora.utils import EMBEDDING_NAMES, auto_detect_lora_target_modules

    if target_modules and set(target_modules) != {"all"}:
        return target_modules
    found = auto_detect_lora_target_modules(base_model) - set(EMBEDDING_NAMES)
    logger.info("elora: adapters may target %s", ", ".join(sorted(found)))
    return found
