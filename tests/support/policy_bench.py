"""A tree small enough to think through, and the view its policy is bound to."""

from __future__ import annotations

from array import array

from elora_sglang.core.costs import Costs
from elora_sglang.core.policies import create_policy
from elora_sglang.core.policies.base import Policy
from elora_sglang.core.tree.tree import DependencyTree, Node


class SizePayloads:
    """Payloads that are only a number of slots."""

    def slice(self, payload: int, start: int, stop: int) -> int:
        return stop - start

    def split(self, payload: int, at: int) -> tuple[int, int]:
        return at, payload - at


class Bench:
    """Policy, tree and view in one; one slot a token, page size 1.

    Attributes:
        waiting: how many requests wait per adapter.
    """

    def __init__(
        self, policy: str | Policy, *, device: int = 100, without: str = "", costs: Costs | None = None
    ) -> None:
        self.costs = Costs.default() if costs is None else costs
        self.page_size, self.batch_size = 1, 4.0
        self.device_slots, self.host_slots = device, device
        self.switched_off = frozenset(without.split())
        self.waiting: dict[str | None, int] = {}
        self.policy = create_policy(policy) if isinstance(policy, str) else policy
        self.policy.bind(self)
        self.tree = DependencyTree(1, self.policy, SizePayloads())

    @property
    def now(self) -> float:
        return self.tree.now

    def waiting_for(self, adapter_key: str | None) -> int:
        return self.waiting.get(adapter_key, 0)

    def resident_adapters(self) -> int:
        return self.tree.root.resident_children - 1

    def reprioritize(self, node: Node) -> None:
        self.tree.reprioritize(node)

    def at(self, now: float) -> None:
        """Time moves on."""
        self.tree.now = now
        self.policy.on_tick()

    def adapter(self, key: str, size: int = 10, *, host: bool = False) -> Node:
        """A resident adapter, with a host copy if ``host``."""
        node = self.tree.register_adapter(key, size)
        if host:
            self.tree.place_on_host(node, size)
        self.tree.make_resident(node, size)
        return node

    def kv(self, first: int, size: int = 10, adapter: Node | None = None) -> Node:
        """A fresh KV node below ``adapter`` (the base model) whose tokens start with ``first``."""
        tokens = array("q", [first, *range(1000, 999 + size)])
        return self.tree.insert(adapter or self.tree.base, tokens, None, size, size).node

    def longer(self, node: Node, first: int, size: int = 10) -> Node:
        """KV that continues ``node``."""
        before = [token for one in self.tree.path(node) for token in one.tokens]
        tokens = array("q", [*before, first, *range(2000, 1999 + size)])
        return self.tree.insert(self.tree.adapter_of(node), tokens, None, len(tokens), len(tokens)).node

    def use(self, *nodes: Node, times: int = 1) -> None:
        """Matched and counted, as an admitted request does it."""
        for node in nodes:
            for _ in range(times):
                if node.kind == "kv":
                    tokens = array("q", [token for one in self.tree.path(node) for token in one.tokens])
                    assert self.tree.match(self.tree.adapter_of(node), tokens).node is node
                else:
                    self.tree.match(node, array("q"))
                self.tree.count_use(node)

    def save(self, node: Node) -> None:
        """A complete host copy of the path to ``node``."""
        save = self.tree.begin_save(node)
        for one in save.nodes:
            self.tree.set_host_payload(one, one.size)
        self.tree.end_transfer(save.id)

    def order(self) -> list[int]:
        """Ids in the order in which everything leaves."""
        self.tree.check()
        return [victim.node_id for victim in self.tree.evict(10**9)]
