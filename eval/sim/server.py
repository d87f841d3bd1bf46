"""A serving engine in simulated time: continuous batching with chunked prefill over a cache model.

As SGLang schedules: a prefill batch goes first where one can be formed; else all running requests decode one step.
Steps in which nothing can happen are taken together. Who enters a batch is the cache's to say: ``--elora``'s asks the
server's own admission, the others go in queue order, as many as fit.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elora_sglang.core.admission import Ask
from elora_sglang.eval.sim.cache import Refused
from elora_sglang.eval.sim.traffic import Arrivals, Traffic

if TYPE_CHECKING:
    from elora_sglang.eval.sim.requests import Request
    from elora_sglang.eval.sim.unified import UnifiedCache

#: Waiting requests that one pass over the queue looks at.
SCAN = 128
#: Share of the tokens that running requests may still generate for which room is kept free at admission (SGLang's
#: new-token ratio).
RESERVE = 0.3


@dataclass
class Outcome:
    """What a run gave: requests in the order they ended, and the times that were spent."""

    ended: list[Request] = field(default_factory=list)
    finished_at: float = 0.0
    busy_s: float = 0.0
    retractions: int = 0
    refused: int = 0


class Server:
    """One engine, on the cache's machine.

    Args:
        cache: the system under test.
        looks: called after each batch; for gauges. What they raise ends the run.
    """

    def __init__(self, cache: UnifiedCache, *looks: Callable[[Server], None]) -> None:
        self.cache, self.machine, self.block_tokens = cache, cache.machine, cache.block_tokens
        self._looks = looks
        self.now = 0.0
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._chunked: Request | None = None
        self.outcome = Outcome()

    def run(self, traffic: Traffic, until: float = math.inf) -> Outcome:
        """Serve requests until none are left; what would arrive ``until`` or later does not come."""
        coming = Arrivals(itertools.takewhile(lambda req: req.arrived < until, traffic.arrivals()))
        while True:
            for req in coming.due(self.now):
                self._arrive(req)
            self.cache.tick(self.now, len(self.running))
            batch = self._form_prefill()
            if batch:
                self._prefill(batch)
            elif self.running:
                self._decode(coming.next)
            else:
                upcoming = [time for time in (coming.next, self._wake()) if time is not None]
                if coming.next is None and not self.waiting:
                    break
                self.now = max(min(upcoming), self.now + 1e-6)
                continue
            for req in self._take_ended():
                following = traffic.follow_up(req)
                if following is not None and following.arrived < until:
                    coming.push(following)
            for look in self._looks:
                look(self)
        self.outcome.finished_at = self.now
        return self.outcome

    def _wake(self) -> float | None:
        """When an idle server looks again: copies and plans, while somebody waits or something moves."""
        return self.cache.next_event() if self.waiting or self.cache.active else None

    def _arrive(self, req: Request) -> None:
        self.waiting.append(req)
        self.cache.enqueue(req)

    # -- prefill --------------------------------------------------------------------------------------

    def _form_prefill(self) -> list[tuple[Request, int]]:
        """Requests and how many tokens of each this batch computes; admits from the queue.

        Who is admitted is decided by ``core/admission.py`` for caches that have it, as in the server.
        """
        budget = self.machine.chunk_tokens
        batch: list[tuple[Request, int]] = []
        self._ready, self._blocking = 0.0, 0.0
        if self._chunked is not None:
            req = self._chunked
            take = min(budget, req.prefill_tokens - req.done)
            batch.append((req, take))
            budget -= take
        if not self.waiting or budget <= 0 or (self._chunked is not None and budget < self.block_tokens):
            return batch
        running = self.running if self._chunked is None else [*self.running, self._chunked]
        self.cache.begin_pass(running, self.machine.chunk_tokens)
        reserve = self._reserved()
        for req in list(itertools.islice(self.waiting, SCAN)):
            rows = self.machine.max_running - len(self.running) - len(batch)
            if budget <= 0 or rows <= 0 or self.cache.closed:
                break
            alone = not self.running and not batch
            growth = 0 if alone else self._slots(req.answer_tokens * RESERVE)
            ask = self._ask(req, growth, reserve, budget, rows, alone)
            if not self.cache.consider(req, ask):
                continue
            found = self.cache.admit(req, ask)
            if isinstance(found, Refused):
                if found.hopeless:
                    self.waiting.remove(req)
                    self.cache.refuse(req)
                    self.outcome.refused += 1
                elif found.ends_scan:
                    break
                continue
            self.waiting.remove(req)
            reserve += growth
            self._ready = max(self._ready, found.ready)
            self._blocking = max(self._blocking, found.blocking_s)
            take = min(budget, req.prefill_tokens - req.done)
            batch.append((req, take))
            budget -= take
        return batch

    def _ask(self, req: Request, growth: int, reserve: int, budget: int, rows: int, alone: bool) -> Ask:
        """What ``req`` would take, in slots, and what the pass has left."""
        return Ask(
            rid=req.rid,
            adapter=req.adapter,
            need=self._slots(req.prefill_tokens + 1) + growth,
            room=self.cache.room() - reserve - self.cache.set_aside,
            length=req.prefill_tokens,
            left=req.answer_tokens - req.made,
            chunk_left=budget,
            rows=rows,
            alone=alone,
        )

    def _reserved(self) -> int:
        left = sum(req.answer_tokens - req.made for req in self.running)
        if self._chunked is not None:
            left += self._chunked.answer_tokens
        return self._slots(left * RESERVE)

    def _slots(self, tokens: float) -> int:
        return math.ceil(tokens / self.block_tokens)

    def _prefill(self, batch: list[tuple[Request, int]]) -> None:
        compute = sum(self.machine.prefill_s(req.done, take) for req, take in batch)
        compute = max(compute, self.machine.step_s) + self.machine.iteration_s
        self.cache.batch([req for req, _ in batch], 0)
        begin = self.now + self._blocking
        # Layer by layer: when the last layer of the loads arrives, only that layer is still to compute.
        end = max(begin + compute, self._ready + compute / self.machine.layers)
        outcome = self.outcome
        outcome.busy_s += end - self.now
        self.now = end
        self._chunked = None
        for req, take in batch:
            req.done += take
            if req.done < req.prefill_tokens:
                self._chunked = req
                continue
            self.cache.computed(req)
            if req.first < 0:
                req.first = self.now + self.machine.front_s
            req.made += 1
            self.running.append(req)

    # -- decode ---------------------------------------------------------------------------------------

    def _decode(self, next_arrival: float | None) -> None:
        running, machine, block = self.running.copy(), self.machine, self.block_tokens
        ranks = sum({req.adapter: req.lora_rank for req in running}.values())
        context, steps = 0, running[0].answer_tokens
        for req in running:
            context += req.prompt_tokens + req.made
            left = req.answer_tokens - req.made
            if left < steps:
                steps = left
        step = machine.step(len(running), context, ranks)
        grown = step + len(running) * machine.step_context_s * steps / 2  # contexts grow while they run
        horizon = [
            t for t in (next_arrival, self.cache.next_event() if self.waiting else None) if t is not None
        ]
        if self.waiting and self.cache.passing:
            steps = 1  # each step may let somebody pass
        elif horizon:
            steps = max(1, min(steps, math.ceil((min(horizon) - self.now) / grown)))
        steps = max(steps, 1)
        needed, total = _growth(running, steps, block)
        while steps > 1 and total > self.cache.room():
            steps //= 2
            needed, total = _growth(running, steps, block)
        for req, slots in needed:
            while req.cache and not self.cache.grow(req, slots):
                self._retract()
        self.cache.batch([], steps)
        for req in self.running:
            req.made += steps
        elapsed = steps * (step + len(running) * machine.step_context_s * (steps - 1) / 2)
        self.now += elapsed
        self.outcome.busy_s += elapsed

    def _retract(self) -> None:
        """Take the last admitted request back to the end of the queue (SGLang retracts those that made least)."""
        victim = self.running.pop()
        self.cache.end(victim, finished=False)
        victim.cache = {}
        self.outcome.retractions += 1
        # What it made is part of its prompt from now on.
        victim.done, victim.again = 0, victim.made
        victim.prompt = victim.whole[: victim.prefill_tokens // self.block_tokens]
        self.waiting.append(victim)
        self.cache.enqueue(victim)

    def _take_ended(self) -> list[Request]:
        ended = [req for req in self.running if req.made >= req.answer_tokens]
        if ended:
            self.running = [req for req in self.running if req.made < req.answer_tokens]
            for req in ended:
                req.ended = self.now + self.machine.front_s
                self.cache.end(req, finished=True)
            self.outcome.ended += ended
        return ended


def _growth(running: list[Request], steps: int, block: int) -> tuple[list[tuple[Request, int]], int]:
    """Who needs how many slots for ``steps`` more tokens, and how many in all.

    The slot that a prompt's last block leaves room for is there.
    """
    needed, total = [], 0
    for req in running:
        tokens = req.prompt_tokens + req.made
        slots = -(-(tokens + steps) // block) - -(-tokens // block)
        if slots:
            needed.append((req, slots))
            total += slots
    return needed, total
