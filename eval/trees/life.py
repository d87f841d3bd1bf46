"""A server's life without its model: what the scheduler asks of ELORA, iteration by iteration, near memory pressure.

An iteration is 25 ms. Up to 32 requests run, about as many wait; sessions of up to eight turns over 256 adapters, whose
popularity falls like a power law, and the base model; half of the turns go on where somebody was lately, half anywhere.
The host tier holds about ``nodes`` nodes, the device half as much, so that all the time something is evicted, saved,
loaded back and forgotten. One life, seeded: equal for all policies, whatever the machine does.
"""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any

from elora_sglang.eval.trees.serverless import build

ITERATION_S = 0.025
RUNNING, WAITING, ADMITTED = 32, 32, 4
ADAPTERS, BASE_SHARE, HINT_SHARE = 256, 0.1, 0.2
SYSTEM, TURN, ANSWER, TURNS = 48, (16, 80), (32, 96), 8
GOES_ON, LATELY = 0.75, 20
#: Slots of a node, roughly: half a turn.
NODE = (sum(TURN) + sum(ANSWER)) // 4
LONGEST = SYSTEM + TURNS * (TURN[1] + ANSWER[1])
#: A request every so many seconds keeps ``RUNNING`` running.
PACE_S = ITERATION_S * (sum(ANSWER) / 2) / RUNNING


@dataclass
class Spent:
    """Seconds of one iteration in ELORA.

    Attributes:
        total: in all that SGLang calls of ELORA's.
        deciding: of these, in the events of the cache manager, where everything is decided.
        total_cpu, deciding_cpu: what the processor spent on them: less, when others want the processor, too.
    """

    total: float = 0.0
    deciding: float = 0.0
    total_cpu: float = 0.0
    deciding_cpu: float = 0.0


@dataclass
class Session:
    """A conversation: what was said so far, and by which adapter."""

    adapter: str | None
    tokens: array[int]
    hints: dict[str, Any] | None
    turns: int = 0


@dataclass
class Life:
    """One scheduler process of ``policy`` whose tree takes about ``nodes`` nodes; see the module.

    Attributes:
        spent: of every iteration so far.
        finished: requests that ended.
        stalled: iterations without decoding, because copies in flight held the last slots.
    """

    policy: str
    nodes: int
    seed: int = 0
    spent: list[Spent] = field(default_factory=list)
    finished: int = 0
    stalled: int = 0

    def __post_init__(self) -> None:
        self._random = rng = random.Random(self.seed)
        sizes = {f"adapter-{i:03}": rng.choice((16, 32, 64)) for i in range(ADAPTERS)}
        host = self.nodes * NODE + sum(sizes.values())
        self.world = build(self.policy, host // 2, host, sizes, RUNNING + 1, LONGEST + 1)
        self.cache = self.world.cache
        self._adapters: list[str | None] = list(sizes)
        self._popularity = [1 / (1 + i) ** 0.9 for i in range(ADAPTERS)]
        self._next_token = 0
        self._systems = [self._text(SYSTEM) for _ in range(ADAPTERS + 1)]
        self._idle: list[Session] = []
        self._most_idle = max(self.nodes // 20, RUNNING + WAITING)
        self.waiting: list[Any] = []
        self.running: list[Any] = []
        self._rows = list(range(1, RUNNING + 1))
        self._requests = 0
        self._now, self._depth = Spent(), 0
        manager = self.cache.manager
        from elora_sglang.core.manager import EVENTS

        for name in (*EVENTS, "ready"):
            setattr(manager, name, self._deciding(getattr(manager, name)))

    # -- the clock --------------------------------------------------------------------------------

    def _elora(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``call(...)``, a call that SGLang makes; its time counts."""
        cpu, started = time.thread_time(), time.perf_counter()
        result = call(*args, **kwargs)
        self._now.total += time.perf_counter() - started
        self._now.total_cpu += time.thread_time() - cpu
        return result

    def _deciding(self, event: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(event)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            cpu, started = time.thread_time(), time.perf_counter()
            try:
                return event(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self._now.deciding += time.perf_counter() - started
                    self._now.deciding_cpu += time.thread_time() - cpu

        return timed

    # -- who comes --------------------------------------------------------------------------------

    def _text(self, tokens: int) -> array[int]:
        start, self._next_token = self._next_token, self._next_token + tokens
        return array("q", range(start, self._next_token))

    def _session(self) -> Session:
        rng, idle = self._random, self._idle
        if idle and rng.random() < GOES_ON:
            lately = min(int(rng.expovariate(1 / LATELY)), len(idle) - 1)
            return idle.pop(-1 - lately if rng.random() < 0.5 else rng.randrange(len(idle)))
        number = rng.choices(range(ADAPTERS), self._popularity)[0]
        if rng.random() < BASE_SHARE:
            number = ADAPTERS
        hints = {"session_id": f"s{self._requests}"} if rng.random() < HINT_SHARE else None
        adapter = self._adapters[number] if number < ADAPTERS else None
        return Session(adapter, self._systems[number][:], hints)

    def _arrive(self) -> None:
        session = self._session()
        tokens = session.tokens + self._text(self._random.randint(*TURN))
        self._requests += 1
        req = SimpleNamespace(
            rid=f"r{self._requests}", lora_id=session.adapter, extra_key=session.adapter, cache_salt=None,
            sampling_params=SimpleNamespace(custom_params=session.hints), origin_input_ids=tokens,
            full_untruncated_fill_ids=tokens[:], refresh_fill_ids=lambda: None, positional_embed_overrides=None,
            retracted_stain=False, to_finish=None, finished=lambda: True, host_hit_length=0,
            kv=SimpleNamespace(req_pool_idx=None, cache_protected_len=0, cache_inserted_len=0),
            session=session, answer=self._random.randint(*ANSWER),
        )  # fmt: skip
        self.waiting.append(req)
        self._elora(self.cache.enqueued, req)

    def _leave(self, session: Session, tokens: array[int]) -> None:
        session.tokens, session.turns = tokens, session.turns + 1
        if session.turns < TURNS:
            self._idle.append(session)
        if len(self._idle) > self._most_idle:
            del self._idle[self._random.randrange(len(self._idle))]

    # -- one iteration ----------------------------------------------------------------------------

    def step(self, *, hurry: bool = False) -> None:
        """One scheduler iteration. ``hurry``: answers are there at once, so that the tree grows fast."""
        self._now = Spent()
        expected = 1.5 if len(self.waiting) < WAITING else 0.5
        if hurry:
            while len(self.waiting) < WAITING:
                self._arrive()
        elif self._random.random() < expected * ITERATION_S / PACE_S:
            self._arrive()
        self._elora(self.cache.tick, len(self.running), bool(self.waiting))
        admitted = self._prefill_pass()
        self._decode(hurry)
        self._results(admitted)
        self.world.clock.now += max(ITERATION_S, PACE_S * len(admitted)) if hurry else ITERATION_S
        self.spent.append(self._now)

    def _prefill_pass(self) -> list[Any]:
        """What ``get_new_batch_prefill`` does: admit from the queue, in order, what fits."""
        admitted: list[Any] = []
        if self.waiting and self._rows:
            self._elora(self.cache.begin_pass, None)
            for req in self.waiting:
                if not self._elora(self.cache.manager.ready, req.rid):
                    continue  # its copy is far from done: others first
                if not self._admit(req):
                    break
                admitted.append(req)
                if len(admitted) == ADMITTED or not self._rows:
                    break
        for req in admitted:
            self.waiting.remove(req)
        self.running += admitted
        return admitted

    def _admit(self, req: Any) -> bool:
        """``init_next_round_input``, ``add_one_req`` and the allocation for the prompt."""
        from sglang.srt.mem_cache.base_prefix_cache import InitLoadBackParams, MatchPrefixParams
        from sglang.srt.mem_cache.radix_cache import RadixKey

        cache, ids = self.cache, req.full_untruncated_fill_ids
        key = RadixKey(ids, req.extra_key, limit=len(ids) - 1, cache_salt=None)
        found = self._elora(cache.match_prefix, MatchPrefixParams(key=key, req=req))
        req.prefix_len, req.last_node = found.device_prefix_len, found.last_device_node
        adapter = self._elora(cache.adapters.node, req.lora_id)
        held = self._elora(cache.lock, req.last_node) if adapter.resident else None
        promised = sum(one.answer for one in self.running)
        need = len(ids) - req.prefix_len + req.answer + (0 if adapter.resident else adapter.size)
        room = self.world.allocator.available_size() + self._elora(cache.evictable_size)
        if need + promised >= room or not (adapter.resident or self._elora(cache.adapters.load, adapter)):
            self._elora(cache.unlock, held)
            return False
        held = held or self._elora(cache.lock, req.last_node)
        if found.host_hit_length:
            params = InitLoadBackParams(found.best_match_node, found.host_hit_length, req=req)
            req.host_loaded_length, req.last_node = self._elora(cache.init_load_back, params)
            req.prefix_len += req.host_loaded_length
        req.lock = self._elora(cache.lock, req.last_node)
        self._elora(cache.unlock, held)
        self._elora(cache.admitted, req)
        req.kv.cache_protected_len = req.prefix_len
        own = self._alloc(len(ids) - req.prefix_len)
        assert own is not None, "a request was admitted that does not fit"
        row = req.kv.req_pool_idx = self._rows.pop()
        self.world.rows.write((row, slice(0, req.prefix_len)), self._elora(cache.prefix_device_indices, req))
        self.world.rows.write((row, slice(req.prefix_len, len(ids))), own)
        self._elora(cache.tier.engine.before_forward, own)
        return True

    def _alloc(self, need: int) -> Any:
        """Room is ELORA's to make, slots are SGLang's to give."""
        allocator = self.world.allocator
        self._elora(allocator.evict_to_free_tokens, self.cache, need)
        return allocator.alloc(need)

    def _decode(self, hurry: bool) -> None:
        """One token more for everybody; the forward waits for its copies, which is not the scheduler's time."""
        cache = self.cache
        cache.tier.wait_until(0)
        steps = [req.answer if hurry else 1 for req in self.running]
        slots = self._alloc(sum(steps)) if steps else None
        if slots is None:
            self.stalled += bool(steps)
            return
        self._elora(cache.tier.engine.before_forward, slots)
        for req, count, given in zip(self.running, steps, slots.split(steps), strict=True):
            at = len(req.full_untruncated_fill_ids)
            req.full_untruncated_fill_ids += self._text(count)
            self.world.rows.write((req.kv.req_pool_idx, slice(at, at + count)), given)
            req.answer -= count

    def _results(self, admitted: Iterable[Any]) -> None:
        """``process_batch_result``: prompts go into the tree, and so does what has ended."""
        cache = self.cache
        for req in admitted:
            self._elora(cache.checkpoint, req, up_to=len(req.origin_input_ids))
        for req in [req for req in self.running if req.answer <= 0]:
            end = len(req.full_untruncated_fill_ids)
            self._elora(cache.checkpoint, req, up_to=end)
            self._elora(cache.unlock, req.lock)
            self._elora(cache.on_release, req, checkpointed=True)
            self._rows.append(req.kv.req_pool_idx)
            self.running.remove(req)
            self.finished += 1
            self._leave(req.session, req.full_untruncated_fill_ids)

    # -- afterwards -------------------------------------------------------------------------------

    def balance(self) -> int:
        """Device slots that nobody accounts for: 0, or something leaks."""
        tree, free = self.cache.tree, self.world.allocator.available_size()
        own = sum(len(r.full_untruncated_fill_ids) - r.kv.cache_protected_len for r in self.running)
        return int(self.world.allocator.size - free - tree.evictable_size - tree.protected_size - own)
