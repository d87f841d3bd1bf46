"""What a cache is built for, and what it answers when a request asks to run."""

from __future__ import annotations

from dataclasses import dataclass

from elora_sglang.eval.sim.machine import Machine


@dataclass(frozen=True)
class Setting:
    """What a cache is built for.

    Attributes:
        machine, block_tokens: constants of time; tokens of a slot.
        adapters: LoRA rank by name.
        device_slots, host_slots: memory for KV and adapters; host 0: none.
    """

    machine: Machine
    block_tokens: int
    adapters: dict[str, int]
    device_slots: int
    host_slots: int

    def adapter_sizes(self) -> dict[str, int]:
        """Slots by adapter."""
        return {
            name: self.machine.adapter_slots(rank, self.block_tokens) for name, rank in self.adapters.items()
        }

    def buffer_size(self) -> int:
        """Slots of a buffer for any adapter: of the largest rank; at least one."""
        return max(self.adapter_sizes().values(), default=self.machine.adapter_slots(1, self.block_tokens))


@dataclass
class Admitted:
    """A request that may run.

    Attributes:
        ready: when the last of what it needs has arrived; layers that came before may be computed already.
        blocking_s: seconds for which its batch can do nothing else.
    """

    ready: float = 0.0
    blocking_s: float = 0.0


@dataclass
class Refused:
    """A request that stays in the queue.

    Attributes:
        ends_scan: nobody behind it is looked at in this pass.
        hopeless: it can never fit.
    """

    ends_scan: bool = True
    hopeless: bool = False
