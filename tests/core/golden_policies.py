"""What each policy decides on one small seeded workload, as counts that a change of behaviour must touch.

Regenerate after an intended change, and read the difference:

    python -m tests.core.golden_policies --write
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from array import array
from pathlib import Path

from elora_sglang.core.policy import Policy, create_policy, policy_names
from elora_sglang.core.tree import DependencyTree, Node, Victim

GOLDEN = Path(__file__).with_name("golden_policies.json")
SEED, POOL, REQUESTS, ADAPTERS = 20260, 3000, 1500, 12


class SizePayloads:
    """Payloads that are only a number of slots."""

    def slice(self, payload: int, start: int, stop: int) -> int:
        return stop - start

    def split(self, payload: int, at: int) -> tuple[int, int]:
        return at, payload - at


class Serving:
    """Requests one after the other: load the adapter, match, make room, insert; chats grow turn by turn."""

    def __init__(self, policy: Policy) -> None:
        self.tree = DependencyTree(1, policy, SizePayloads())
        self.free = POOL
        self.counts = dict.fromkeys(("kv_victims", "kv_slots", "adapter_victims", "loads", "hit_tokens"), 0)
        self.order = hashlib.sha256()

    def _receive(self, victims: list[Victim]) -> None:
        for victim in victims:
            self.free += victim.size
            self.counts[f"{victim.kind}_victims"] += 1
            self.counts["kv_slots"] += victim.size if victim.kind == "kv" else 0
            self.order.update(f"{victim.node_id} ".encode())

    def _take(self, slots: int) -> None:
        if slots > self.free:
            self._receive(self.tree.evict(slots - self.free))
        assert slots <= self.free
        self.free -= slots

    def request(self, adapter: Node, prompt: array[int]) -> None:
        if not adapter.resident:
            self._take(adapter.size)
            self.tree.make_resident(adapter, adapter.size)
            self.counts["loads"] += 1
        match = self.tree.match(adapter, prompt)
        self.counts["hit_tokens"] += match.length
        self.tree.lock(match.node)
        self._take(len(prompt) - match.length)
        self.tree.insert(adapter, prompt, None, len(prompt), len(prompt))
        self.tree.unlock(match.node)


def decide(policy: str) -> dict[str, int | str]:
    """Counts and the hash of the victims' order for one policy."""
    rng = random.Random(SEED)
    serving = Serving(create_policy(policy))
    nodes = [serving.tree.register_adapter(f"a{i}", 20 * (1 + i % 5)) for i in range(ADAPTERS)]
    weights = [1.0 / (1 + i) for i in range(ADAPTERS)]
    chats: list[tuple[Node, array[int]]] = []
    for _ in range(REQUESTS):
        if chats and rng.random() < 0.6:
            adapter, prompt = chats[-1 - min(int(rng.expovariate(0.1)), len(chats) - 1)]
        else:
            adapter, prompt = rng.choices(nodes, weights)[0], array("q", range(rng.randrange(5, 30)))
            chats.append((adapter, prompt))
        prompt.extend(rng.randrange(1000) for _ in range(rng.randrange(5, 40)))
        del prompt[400:]
        serving.request(adapter, prompt)
    serving.tree.check()
    return {**serving.counts, "victims_sha256": serving.order.hexdigest()[:16]}


def main() -> int:
    """Print the counts, or with ``--write`` make them the golden ones."""
    text = json.dumps({policy: decide(policy) for policy in policy_names()}, indent=2) + "\n"
    if sys.argv[1:] == ["--write"]:
        GOLDEN.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
