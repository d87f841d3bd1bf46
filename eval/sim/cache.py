"""What a simulated server asks of a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from elora_sglang.eval.sim.requests import Request


@dataclass
class Admission:
    """A request that may run.

    Attributes:
        ready: when the last of what it needs has arrived; layers that came before may be computed already.
        blocking_s: seconds for which its batch can do nothing else.
    """

    ready: float = 0.0
    blocking_s: float = 0.0


class Cache(Protocol):
    """What a simulated server asks of a cache."""

    def enqueue(self, req: Request) -> None:
        """It waits from now on."""
        ...

    def tick(self, now: float, running: int) -> None:
        """Time goes on; copies end, others start."""
        ...

    def hold(self, req: Request) -> bool:
        """Whether it had better wait, while others run, for what is on its way."""
        ...

    def admit(self, req: Request, now: float, reserve: int) -> Admission | None:
        """Give it a prefix, its adapter and slots for its prompt, leaving ``reserve`` slots; None: no room."""
        ...

    def computed(self, req: Request) -> None:
        """Its prompt's KV is complete."""
        ...

    def grow(self, req: Request, slots: int) -> bool:
        """Give it more slots; False, with nothing changed, when there are none."""
        ...

    def end(self, req: Request, *, finished: bool) -> None:
        """It is done, or is taken back to the queue."""
        ...

    def room(self) -> int:
        """Slots that are free or could be."""
        ...

    def refuse(self, req: Request) -> None:
        """It waits no more, because it can never fit."""
        ...

    @property
    def active(self) -> bool:
        """Whether something moves that nobody waits for."""
        ...

    def next_event(self) -> float | None:
        """When a copy ends or a plan is due."""
        ...
