"""What an exploration starts from: adapters, prompts, pools, policy, and the events that went before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from elora_sglang.core.costs import Costs
from elora_sglang.core.manager import SwapSettings
from elora_sglang.core.policies import create_policy
from elora_sglang.core.policies.base import BasePolicy, Policy
from elora_sglang.core.tree.node import Node

#: An event of a :class:`~elora_sglang.eval.interleavings.world.World`: its name, then whom it befalls.
Event = tuple[Any, ...]

#: A fast link and slow computing, so that every copy that may be worth something is made.
COSTS = Costs(1024, 1e9, 1e9, 1e8, 0.0, 1e-3, 1e-6)

#: Name of the policy that takes whomever the search chooses: all policies that keep the dependency, in one.
ANY = "any"

#: Two that share their first token, which splits the node of the first of them.
PROMPTS = ((1, 2, 3), (1, 4))


class Anybody(BasePolicy):
    """Nobody is worth more than another, but for the one that is to leave next. Any host copy may be given up."""

    chosen: Node | None = None

    def priority(self, node: Node) -> float:
        """Everybody's but the chosen one's is the same."""
        return 0.0 if node is not self.chosen else -1.0

    def host_priority(self, node: Node) -> float:
        """Less than anything on the device, so that there is always room on the host."""
        return -2.0


@dataclass(frozen=True)
class Scene:
    """A small server.

    Attributes:
        policy: a policy's name, or :data:`ANY`.
        host: host slots; 0: no host tier.
        device: device slots; a little less than everything needs.
        adapters: names, of which ``None`` is the base model. The others are alike.
        adapter_size: slots of each adapter.
        prompts: what may be asked.
        live: requests that wait or run at one time.
        answers: tokens that each request generates.
        jams: whether the start of a copy may fail.
        placed: whether the tier has host copies of adapters that were just loaded; else only their files are there.
        pins: whether adapters are pinned and unpinned.
        backup: whether the swapper saves ahead of need.
        dependency: whether KV keeps its adapter on the device.
        before: events that happened already.
    """

    policy: str = "lru"
    host: int = 9
    device: int = 8
    adapters: tuple[str | None, ...] = ("a", "b")
    adapter_size: int = 2
    prompts: tuple[tuple[int, ...], ...] = PROMPTS
    live: int = 2
    answers: int = 0
    jams: bool = True
    placed: bool = True
    pins: bool = False
    backup: bool = True
    dependency: bool = True
    before: tuple[Event, ...] = field(default=())

    def settings(self) -> SwapSettings:
        """The swapper at its most eager."""
        return SwapSettings(
            host_slots=self.host,
            swap_interval_s=0.0,
            busy_watermark=0.8,
            idle_watermark=0.7,
            inflight_share=1.0,
            backup=self.backup,
        )

    def create_policy(self) -> Policy:
        """A fresh one."""
        policy: Policy = Anybody() if self.policy == ANY else create_policy(self.policy)
        policy.dependency = self.dependency and policy.dependency
        return policy


def served(adapter: str | None, prompt: tuple[int, ...]) -> tuple[Event, ...]:
    """The events of a request that nothing disturbs."""
    return (("ask", adapter, prompt), ("pass",), ("run",), ("finish", 0))


#: Nothing happened yet; a chat is in the cache; the same, and it was saved; the second adapter has only its file.
STARTS: dict[str, tuple[Event, ...]] = {
    "empty": (),
    "chat": served("a", PROMPTS[0]),
    "saved": (*served("a", PROMPTS[0]), ("tick", None, True), ("tick", "all", True)),
    "split": (
        *served("a", PROMPTS[1]),
        ("tick", None, True),
        ("tick", "all", True),
        *served("a", PROMPTS[0]),
    ),
}

#: Scenes by name, each with what it is there for.
SCENES: dict[str, tuple[Scene, str]] = {
    "any": (Scene(policy=ANY), "whoever may leave leaves, in every order; two tiers"),
    "any-narrow": (
        Scene(policy=ANY, adapters=("a", None), jams=False),
        "one adapter and the base model, every copy can start",
    ),
    "device": (Scene(policy=ANY, host=0, device=7), "no host tier"),
    "files": (Scene(policy=ANY, placed=False, host=5), "adapters are read from their files, little room"),
    "saved": (Scene(policy=ANY, before=STARTS["saved"]), "from a chat that has a host copy"),
    "split": (Scene(policy="lru", before=STARTS["split"]), "from a shared prefix that has a host copy"),
    "answers": (Scene(policy=ANY, answers=1, device=9, jams=False), "requests grow, and are retracted"),
    "pinned": (
        Scene(policy=ANY, adapters=("a", None), pins=True, jams=False),
        "an adapter is pinned and unpinned",
    ),
    "lru": (Scene(), "policy lru"),
    "elora": (Scene(policy="elora", jams=False), "policy elora"),
    "independent": (
        Scene(policy="static", dependency=False, before=STARTS["split"], adapters=("a",), jams=False),
        "policy static without the dependency: KV may outlive its adapter",
    ),
}
