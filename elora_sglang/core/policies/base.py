"""What an eviction policy is, and how one is found by its name.

A policy is one file in :mod:`elora_sglang.core.policies`: the file's name is the policy's name (`-` and `_` are
the same), and the file defines ``create() -> BasePolicy``. Adding one edits no other file.
"""

from __future__ import annotations

import abc
from typing import Protocol

from elora_sglang.core.costs import Costs
from elora_sglang.core.hints import Hints
from elora_sglang.core.swap_settings import LORA_SHARE
from elora_sglang.core.tree.node import Kind, Node
from elora_sglang.core.tree.ranking import Ranking

__all__ = ["LORA_SHARE", "BasePolicy", "Policy", "PolicyView", "UnboundView"]


class PolicyView(Protocol):
    """What a policy may look at besides nodes; all of it follows from recorded events."""

    @property
    def now(self) -> float:
        """Seconds, as of the last tick."""
        ...

    @property
    def costs(self) -> Costs:
        """The costs of the last tick that brought some."""
        ...

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        ...

    @property
    def batch_size(self) -> float:
        """Mean number of running and waiting requests over the last 5 s (``BS`` of the paper's Eq. 3)."""
        ...

    @property
    def device_slots(self) -> int:
        """Slots of the device pool; 0: unknown."""
        ...

    @property
    def host_slots(self) -> int:
        """Slots of the host pool; 0: none."""
        ...

    @property
    def switched_off(self) -> frozenset[str]:
        """Names of the switched-off terms: frequency, recency, cost, pressure, ghosts, hints, predictor."""
        ...

    def waiting_for(self, adapter_key: str | None) -> int:
        """How many waiting requests need the adapter."""
        ...

    def resident_adapters(self) -> int:
        """How many adapters have device slots, the base model not counted (``Now_LoRA`` of Eq. 4)."""
        ...

    def reprioritize(self, node: Node) -> None:
        """A priority of ``node`` fell without an event of the node: its place among the candidates follows."""
        ...


class UnboundView:
    """The view of a policy that nobody has bound: time stands still, nothing waits, costs are the default."""

    now = 0.0
    costs = Costs.default()
    page_size = 1
    batch_size = 0.0
    device_slots = 0
    host_slots = 0
    switched_off: frozenset[str] = frozenset()

    def waiting_for(self, adapter_key: str | None) -> int:
        """Nobody waits."""
        return 0

    def resident_adapters(self) -> int:
        """No adapter is on the device."""
        return 0

    def reprioritize(self, node: Node) -> None:
        """Ignored: without a tree there are no candidates."""


class Policy(Ranking, Protocol):
    """A :class:`Ranking` that looks at more than nodes, and is told of more than the tree knows.

    Attributes:
        lora_share: share of the device that :meth:`side` gives to adapters, where it separates them.
    """

    lora_share: float

    def bind(self, view: PolicyView) -> None:
        """Called once before anything else."""
        ...

    def on_finish(self, node: Node, hints: Hints) -> None:
        """A request ended; ``node`` is the last one of its path, in the tree."""
        ...

    def on_tick(self) -> None:
        """``view.now`` moved on."""
        ...


class BasePolicy(abc.ABC):
    """Everything but :meth:`priority`: one order for both kinds and tiers, and events that change nothing."""

    dependency = True
    exact = True
    lora_share = LORA_SHARE

    view: PolicyView = UnboundView()
    _largest_adapter = 1

    def bind(self, view: PolicyView) -> None:
        """Keep the view for later."""
        self.view = view

    @abc.abstractmethod
    def priority(self, node: Node) -> float:
        """Value of keeping ``node`` on the device; the lowest leaves first, ties by node id."""

    def host_priority(self, node: Node) -> float:
        """The same as on the device."""
        return self.priority(node)

    def side(self, need: Kind, used_by_adapters: int) -> Kind | None:
        """One order for both kinds, unless the term ``unified`` is switched off."""
        return self.fixed_side(need, used_by_adapters) if "unified" in self.view.switched_off else None

    def fixed_side(self, need: Kind, used_by_adapters: int) -> Kind:
        """The side that is over its fixed share, or would be once the room that is needed is filled."""
        incoming = self._largest_adapter if need == "adapter" else 0
        budget = self.lora_share * self.view.device_slots
        return "adapter" if used_by_adapters + incoming > budget else "kv"

    def on_insert(self, node: Node) -> None:
        """Remembers how large adapters are."""
        if node.kind == "adapter" and node.size > self._largest_adapter:
            self._largest_adapter = node.size

    def on_use(self, node: Node) -> None:  # noqa: B027  # optional, not abstract
        """Takes no note of it."""

    def on_access(self, node: Node) -> None:  # noqa: B027
        """Takes no note of it."""

    def on_split(self, upper: Node, lower: Node) -> None:  # noqa: B027
        """Takes no note of it."""

    def on_evict(self, node: Node) -> None:  # noqa: B027
        """Takes no note of it."""

    def on_drop(self, node: Node) -> None:  # noqa: B027
        """Takes no note of it."""

    def on_finish(self, node: Node, hints: Hints) -> None:  # noqa: B027
        """Takes no note of it."""

    def on_tick(self) -> None:  # noqa: B027
        """Takes no note of it."""

    def on_reset(self) -> None:  # noqa: B027
        """Takes no note of it."""
