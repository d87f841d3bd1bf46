"""What a simulated server asks of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from elora_sglang.core.admission import Ask

if TYPE_CHECKING:
    from elora_sglang.eval.sim.requests import Request


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


class Cache(Protocol):
    """What a simulated server asks of a cache.

    Attributes:
        set_aside: slots that this pass keeps for requests that it looked past.
        closed: whether nobody else may enter in this pass.
        passing: whether somebody was looked past and others may pass it, now or some batches later.
    """

    set_aside: int
    closed: bool

    @property
    def passing(self) -> bool: ...

    def enqueue(self, req: Request) -> None:
        """It waits from now on."""
        ...

    def tick(self, now: float, running: int) -> None:
        """Time goes on; copies end, others start."""
        ...

    def begin_pass(self, running: Sequence[Request], chunk: int) -> None:
        """A pass over the queue begins."""
        ...

    def consider(self, req: Request, ask: Ask) -> bool:
        """Whether it may be looked at now."""
        ...

    def admit(self, req: Request, ask: Ask) -> Admitted | Refused:
        """Give it a prefix, its adapter and slots for its prompt; or say why not."""
        ...

    def batch(self, prefilled: Sequence[Request], decodes: int) -> None:
        """A batch runs: a prefill of these requests, or so many decode steps."""
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
