"""What each policy decides on small seeded workloads, as counts that a change of behaviour must touch.

Regenerate after an intended change, and read the difference:

    PYTHONPATH=tests python tests/core/policies/golden_policies.py --regenerate

Without the option the counts are printed; ``--table`` prints one line per policy and workload.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from support.policy_bench import SizePayloads

from elora_sglang.core.costs import Costs
from elora_sglang.core.hints import Hints
from elora_sglang.core.policies import create_policy, policy_names
from elora_sglang.core.policies.base import Policy
from elora_sglang.core.tree.tree import DependencyTree, Node

GOLDEN = Path(__file__).with_name("golden_policies.json")
PAGE, BATCH = 4, 6.0


class Request(NamedTuple):
    """One request: arrival in seconds, adapter number, prompt, and how many tokens the answer has."""

    time: float
    adapter: int
    prompt: array[int]
    answer: array[int]
    hints: Hints = Hints()


class Workload(NamedTuple):
    """Requests in order of arrival, the adapters' sizes, and the slots of both tiers."""

    requests: list[Request]
    adapters: list[int]
    device: int
    host: int


class Serving:
    """One request after the other; also the view its policy is bound to."""

    def __init__(
        self, policy: Policy, workload: Workload, *, without: frozenset[str] = frozenset(), hints: bool = True
    ) -> None:
        self.costs, self.page_size, self.batch_size = Costs.default(), PAGE, BATCH
        self.device_slots, self.host_slots, self.switched_off = workload.device, workload.host, without
        self.tree = DependencyTree(PAGE, policy, SizePayloads())
        self.policy, self.hints = policy, hints
        policy.bind(self)
        self.adapters = [
            self.tree.register_adapter(f"a{i}", size) for i, size in enumerate(workload.adapters)
        ]
        names = (
            "hit_tokens",
            "host_hit_tokens",
            "kv_victims",
            "adapter_victims",
            "adapter_loads",
            "invalid_kv",
        )
        self.counts = dict.fromkeys(names, 0)
        self.seconds = 0.0
        self.order = hashlib.sha256()

    @property
    def now(self) -> float:
        return self.tree.now

    def waiting_for(self, adapter_key: str | None) -> int:
        return 0

    def resident_adapters(self) -> int:
        return self.tree.counts()["adapters_resident"]

    def reprioritize(self, node: Node) -> None:
        self.tree.reprioritize(node)

    def _take(self, slots: int, kind: str) -> None:
        missing = slots - (self.device_slots - self.tree.evictable_size - self.tree.protected_size)
        if missing > 0:
            for victim in self.tree.evict(missing, kind):  # type: ignore[arg-type]
                self.counts[f"{victim.kind}_victims"] += 1
                self.order.update(f"{victim.node_id} ".encode())
                missing -= victim.size
            assert missing <= 0
            self.counts["invalid_kv"] = max(self.counts["invalid_kv"], self.tree.invalid_kv_size)

    def _host_room(self, slots: int) -> bool:
        missing = slots - (self.host_slots - self.tree.host_size)
        if missing > 0:
            for victim in self.tree.evict_host(missing):
                self.order.update(f"h{victim.node_id} ".encode())
                missing -= victim.size
        return missing <= 0

    def serve(self, request: Request) -> None:
        tree, costs, adapter = self.tree, self.costs, self.adapters[request.adapter]
        tree.now = max(request.time, tree.now)
        self.policy.on_tick()
        match = tree.match(adapter, request.prompt)
        end = match.host_node
        tree.lock(end)
        if not adapter.resident:
            self.counts["adapter_loads"] += 1
        if not adapter.resident and not adapter.host:
            self._take(adapter.size, "adapter")
            tree.make_resident(adapter, adapter.size)
            self.seconds += costs.disk_s(adapter.size) + costs.load_s(adapter.size)
            if adapter.size <= self.host_slots and self._host_room(adapter.size):
                tree.place_on_host(adapter, adapter.size)
        missing = tree.missing(end)
        if missing:
            size = sum(node.size for node in missing)
            self._take(size, "adapter" if missing[0].kind == "adapter" else "kv")
            load = tree.begin_load(end)
            for node in load.nodes:
                tree.set_payload(node, node.size)
            tree.end_transfer(load.id)
            self.seconds += costs.load_s(size)
        tree.count_use(end)
        length = match.length + match.host_length
        self.counts["hit_tokens"] += match.length
        self.counts["host_hit_tokens"] += match.host_length
        self.seconds += costs.recompute_s(length, len(request.prompt) - length)
        tokens = request.prompt + request.answer
        self._take(len(tokens) - length, "kv")
        last = tree.insert(adapter, tokens, None, len(tokens), len(tokens)).node
        tree.unlock(end)
        self.policy.on_finish(last, request.hints if self.hints else Hints())
        self._back_up(last)

    def _back_up(self, node: Node) -> None:
        need, above = 0, node
        while above.kind == "kv" and not above.host and above.parent is not None:
            need, above = need + above.size, above.parent
        if not need or not above.clean:
            return
        self.tree.lock(node)
        if need <= self.host_slots and self._host_room(need) and above.clean:
            save = self.tree.begin_save(node)
            for one in save.nodes:
                self.tree.set_host_payload(one, one.size)
            self.tree.end_transfer(save.id)
        self.tree.unlock(node)


def _text(rng: random.Random, tokens: int) -> array[int]:
    return array("q", [rng.randrange(50_000) for _ in range(tokens)])


def chat(seed: int, *, hints: bool = False, host: int = 0, sessions: int = 260) -> Workload:
    """Conversations over 12 adapters with a system prompt each; on even ones most come back, on odd ones few do."""
    rng = random.Random(seed)
    systems = [_text(rng, rng.randrange(16, 64)) for _ in range(12)]
    weights = [1.0 / (1 + i) for i in range(12)]
    requests = []
    for number in range(sessions):
        adapter = rng.choices(range(12), weights)[0]
        time, text = number * 8.0 + rng.random(), systems[adapter] + _text(rng, rng.randrange(20, 120))
        stay = 0.85 if adapter % 2 == 0 else 0.1
        while True:
            answer, more = _text(rng, rng.randrange(10, 60)), rng.random() < stay and len(text) < 1200
            gap = rng.expovariate(1 / 100.0) + 10.0
            told = Hints(f"s{number}", not more, round(gap) if more else None) if hints else Hints()
            requests.append(Request(time, adapter, text[:], answer, told))
            if not more:
                break
            time, text = time + gap, text + answer + _text(rng, rng.randrange(20, 120))
    requests.sort(key=lambda request: request.time)
    return Workload(requests, [24 * (1 + i % 4) for i in range(12)], 4000, host)


def churn(seed: int, *, host: int = 2500) -> Workload:
    """60 adapters of very different size whose popularity drifts; short prompts, little to reuse but the adapters."""
    rng = random.Random(seed)
    systems = [_text(rng, 24) for _ in range(60)]
    weights = [1.0 / (1 + i) ** 0.9 for i in range(60)]
    requests = []
    for number in range(900):
        adapter = (rng.choices(range(60), weights)[0] + 7 * (number // 300)) % 60
        prompt = systems[adapter] + _text(rng, rng.randrange(8, 60))
        requests.append(
            Request(number * 1.5 + rng.random(), adapter, prompt, _text(rng, rng.randrange(4, 20)))
        )
    return Workload(requests, [16 * (1 + i * i % 9) for i in range(60)], 1800, host)


def scan(seed: int, *, host: int = 0) -> Workload:
    """25 documents that are asked about again and again, among long prompts that nobody ever sends twice."""
    rng = random.Random(seed)
    documents = [(rng.randrange(6), _text(rng, rng.randrange(60, 160))) for _ in range(25)]
    requests = []
    for number in range(800):
        if rng.random() < 0.45:
            adapter, prompt = rng.randrange(6), _text(rng, rng.randrange(100, 300))
        else:
            adapter, document = documents[min(int(rng.expovariate(0.12)), 24)]
            prompt = document + _text(rng, rng.randrange(8, 24))
        requests.append(Request(number * 2.0 + rng.random(), adapter, prompt, _text(rng, 12)))
    return Workload(requests, [40] * 6, 3000, host)


#: Name of a golden workload → its requests.
WORKLOADS: dict[str, Callable[[], Workload]] = {
    "chat": lambda: chat(1),
    "chat-host": lambda: chat(2, host=9000),
    "chat-hints": lambda: chat(1, hints=True),
    "churn": lambda: churn(3),
    "scan": lambda: scan(4),
}


def run(
    policy: str, workload: Workload, *, without: frozenset[str] = frozenset(), hints: bool = True
) -> Serving:
    """Serve the whole workload under the policy, and check the tree."""
    serving = Serving(create_policy(policy), workload, without=without, hints=hints)
    for request in workload.requests:
        serving.serve(request)
    serving.tree.check()
    return serving


def decide(policy: str, name: str) -> dict[str, int | str]:
    """Counts, the milliseconds of loads and prefills, and the hash of the victims' order."""
    serving = run(policy, WORKLOADS[name]())
    order = serving.order.hexdigest()[:16]
    return {**serving.counts, "cost_ms": round(serving.seconds * 1e3), "victims_sha256": order}


def main() -> int:
    """Print the counts, or make them the golden ones."""
    counts = {policy: {name: decide(policy, name) for name in WORKLOADS} for policy in policy_names()}
    if sys.argv[1:] == ["--regenerate"]:
        GOLDEN.write_text(json.dumps(counts, indent=1) + "\n")
    elif sys.argv[1:] == ["--table"]:
        for name in WORKLOADS:
            for policy, values in sorted(counts.items(), key=lambda item: item[1][name]["cost_ms"]):
                print(
                    name, policy, *(f"{key}={value}" for key, value in values[name].items() if key[0] != "v")
                )
    else:
        print(json.dumps(counts, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
