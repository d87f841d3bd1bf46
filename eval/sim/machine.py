"""What a machine with a model costs: constants of a simulation, and proportions of a live run, from a JSON file.

One format for every ``--profile``; those that come with the package are ``eval/profiles/*.json``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from elora_sglang.core.costs import Costs

FOLDER = Path(__file__).resolve().parents[1] / "profiles"


class MachineError(ValueError):
    """A profile that cannot be used: which, why, and what to do."""


@dataclass(frozen=True)
class Machine:
    """One model on one server; every figure is of the whole server, all its GPUs together.

    Attributes:
        name: for people.
        sources: where each constant comes from, by field name, or ``default``.
        gpus: tensor-parallel GPUs.
        kv_bytes_per_token: KV of one token, all layers.
        adapter_bytes_per_rank: bytes of an adapter per LoRA rank.
        layers: layers of the model: a load that arrives layer by layer hides all but one of them.
        device_bytes: device memory for KV and adapters together.
        host_bytes: host memory for both.
        load_bytes_s, save_bytes_s: host to device and back, bytes per second.
        disk_bytes_s: adapter file to host memory, bytes per second.
        latency_s: fixed seconds of a copy.
        prefill_token_s, prefill_token2_s: seconds a prefilled token, and more a token and token of context.
        step_s: seconds of a decode step whatever it holds (weights are read once).
        step_request_s: more for each request of the batch.
        step_context_s: more for each token of context.
        step_rank_s: more for each LoRA rank of each distinct adapter in a batch.
        iteration_s: seconds of the scheduler around each batch.
        front_s: seconds of a request outside the scheduler (HTTP, tokenizer, the way back), which TTFT has on top.
        slot_load_s: seconds that stock LoRA loading adds to an adapter's bytes.
        max_running: requests that run at once.
        chunk_tokens: tokens that one prefill batch takes.
    """

    name: str
    sources: dict[str, str]
    gpus: int
    kv_bytes_per_token: int
    adapter_bytes_per_rank: int
    layers: int
    device_bytes: float
    host_bytes: float
    load_bytes_s: float
    save_bytes_s: float
    disk_bytes_s: float
    latency_s: float
    prefill_token_s: float
    prefill_token2_s: float
    step_s: float
    step_request_s: float
    step_context_s: float
    step_rank_s: float
    iteration_s: float
    front_s: float
    slot_load_s: float
    max_running: int
    chunk_tokens: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("name", "sources"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise MachineError(
                    f"machine {self.name!r}: {field.name} must be a finite number, got {value!r}"
                )
            least = 0.0 if field.name.endswith("_s") and not field.name.endswith("bytes_s") else math.ulp(0.0)
            if value < least:
                raise MachineError(f"machine {self.name!r}: {field.name} must be above 0, got {value!r}")

    def costs(self, block_tokens: int) -> Costs:
        """What the cache manager is told, where a slot stands for ``block_tokens`` tokens."""
        return Costs(
            slot_bytes=self.kv_bytes_per_token * block_tokens,
            load_bytes_s=self.load_bytes_s,
            save_bytes_s=self.save_bytes_s,
            disk_bytes_s=self.disk_bytes_s,
            latency_s=self.latency_s,
            prefill_token_s=self.prefill_token_s * block_tokens,
            prefill_token2_s=self.prefill_token2_s * block_tokens**2,
        )

    def slots(self, block_tokens: int, memory: float = 1.0) -> tuple[int, int]:
        """Slots of ``block_tokens`` tokens in a share ``memory`` of the device, and in the host."""
        slot = self.kv_bytes_per_token * block_tokens
        return int(memory * self.device_bytes // slot), int(self.host_bytes // slot)

    def adapter_slots(self, lora_rank: int, block_tokens: int) -> int:
        """Slots of an adapter, where a slot stands for ``block_tokens`` tokens."""
        slot = self.kv_bytes_per_token * block_tokens
        return -(-lora_rank * self.adapter_bytes_per_rank // slot)

    def prefill_s(self, start: int, tokens: int) -> float:
        """Seconds to prefill ``tokens`` after ``start`` tokens of context, without what a batch costs by itself."""
        pairs = tokens * start + tokens * (tokens - 1) / 2
        return tokens * self.prefill_token_s + pairs * self.prefill_token2_s

    def step(self, requests: int, context: int, ranks: int) -> float:
        """Seconds of a decode step of ``requests`` with ``context`` tokens and ``ranks`` LoRA ranks in all."""
        return (
            self.step_s
            + requests * self.step_request_s
            + context * self.step_context_s
            + ranks * self.step_rank_s
            + self.iteration_s
        )

    @property
    def link_to_compute(self) -> float:
        """Seconds to load one token's KV over seconds to prefill one token."""
        return self.kv_bytes_per_token / self.load_bytes_s / self.prefill_token_s

    def link_for(self, kv_bytes_per_token: int, prefill_token_s: float) -> float:
        """GB/s at which a machine that prefills a token in so many seconds has this one's link-to-compute ratio.

        Raises ValueError for a cost that is not above 0.
        """
        if kv_bytes_per_token <= 0 or prefill_token_s <= 0:
            raise ValueError(
                f"costs must be above 0, got {kv_bytes_per_token} bytes and {prefill_token_s} s a token"
            )
        return kv_bytes_per_token / (self.link_to_compute * prefill_token_s) / 1e9

    def to_json(self) -> str:
        """The profile's file; :func:`load` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def names() -> list[str]:
    """Profiles that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name: str) -> Machine:
    """A profile by its name, or of a ``.json`` file. Raises MachineError with one line that says what to do."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MachineError(f"no machine profile {name!r}; there are: {', '.join(names())}") from None
    except ValueError as error:
        raise MachineError(f"{path}: not JSON ({error}); write it with `calibrate`") from None
    fields = {field.name for field in dataclasses.fields(Machine)}
    if not isinstance(values, dict) or set(values) != fields:
        wrong = ", ".join(sorted(fields ^ set(values))) if isinstance(values, dict) else "not an object"
        raise MachineError(f"{path}: its fields are not those of a machine profile: {wrong}")
    return Machine(**values)
