"""A discrete model of a server whose requests hold adapters and tokens in one pool.

It goes in batches, as SGLang does: prefill first, in chunks, while decodes stand still; else one token for everybody
who runs. A request reserves its prompt and ``max_new`` tokens; it may end earlier, which nobody knows. Adapters stay
in the pool until their room is needed. ``order`` says who may pass a request that lacks room for its adapter:
nobody (``"fcfs"``), whom :class:`Overtaking` lets (``"rule"``), or everybody who fits (``"anybody"``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from elora_sglang.core.overtaking import Overtaking


@dataclass(frozen=True)
class Job:
    """One request; ``length``: tokens it really generates, at most ``max_new``."""

    rid: str
    arrival: int
    adapter: str | None
    prompt: int
    max_new: int
    length: int

    @property
    def tokens(self) -> int:
        """Slots that it reserves for itself."""
        return self.prompt + self.max_new + 1


@dataclass
class Running:
    """A request that runs: prompt tokens not yet computed, and tokens not yet generated."""

    job: Job
    prompt: int
    left: int


@dataclass
class Server:
    """State of one server; ``waits`` are in batches, by request, ``since`` is when each was queued."""

    pool: int
    sizes: dict[str, int]
    chunk: int
    rows: int
    order: str = "rule"
    now: int = 0
    queue: list[Job] = field(default_factory=list)
    running: list[Running] = field(default_factory=list)
    #: Adapters in the pool, used longest ago first.
    resident: list[str] = field(default_factory=list)
    waits: dict[str, int] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)
    rule: Overtaking = field(default_factory=Overtaking)
    passes: int = 0
    deepest: int = 0
    #: Called when a request's clock starts: the server, how many wait up to it, and whether a pass is going on.
    on_clock: Callable[[Server, int, bool], None] | None = None

    # -- room -------------------------------------------------------------------------------------

    def used(self) -> set[str]:
        """Adapters of running requests."""
        return {one.job.adapter for one in self.running if one.job.adapter is not None}

    def room(self) -> int:
        """Slots that running requests neither hold nor reserved."""
        held = sum(one.job.tokens for one in self.running)
        return self.pool - held - sum(self.sizes[name] for name in self.used())

    def need(self, job: Job) -> int:
        """Slots that the request takes."""
        own = job.adapter is not None and job.adapter not in self.used()
        return job.tokens + (self.sizes[job.adapter] if own and job.adapter else 0)

    def cold(self, job: Job) -> bool:
        """Whether its adapter is not in the pool."""
        return job.adapter is not None and job.adapter not in self.resident

    def held_by(self, late: list[str]) -> int:
        """Slots that go when the requests ``late`` end."""
        names = set(late)
        others = {one.job.adapter for one in self.running if one.job.rid not in names}
        mine = [one.job for one in self.running if one.job.rid in names]
        adapters = {job.adapter for job in mine} - others - {None}
        return sum(job.tokens for job in mine) + sum(self.sizes[name] for name in adapters if name)

    # -- one batch --------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        """The request is queued."""
        self.queue.append(job)
        self.since[job.rid] = self.now
        self.deepest = max(self.deepest, len(self.queue))
        self.rule.queue(job.rid, for_adapter=self.cold(job))
        if self.on_clock and self.cold(job):
            self.on_clock(self, len(self.queue), False)

    def step(self) -> bool:
        """One pass and one batch; ``False``: there was nothing to run."""
        budget = self.chunk
        batch: list[Running] = []
        for one in self.running:
            if one.prompt:
                budget -= self._prefill(one, budget, batch)
        self._admit(budget, batch)
        if batch:
            self._count(batch, prefill=True)
            done = [one for one in batch if not one.prompt]
        elif self.running:
            self._count(self.running, prefill=False)
            done = list(self.running)
        else:
            return False
        for one in done:
            one.left -= 1
        self.running = [one for one in self.running if one.left > 0]
        return True

    def _count(self, batch: list[Running], *, prefill: bool) -> None:
        self.now += 1
        self.rule.batch((one.job.rid for one in batch), prefill=prefill, decode=not prefill)

    def _prefill(self, one: Running, budget: int, batch: list[Running]) -> int:
        taken = min(one.prompt, budget)
        one.prompt -= taken
        batch.append(one)
        return taken

    def _admit(self, budget: int, batch: list[Running]) -> None:
        """The pass: as ``EloraPrefillAdder`` and SGLang's scan of the queue."""
        rule, blocked, admitted = self.rule, False, set()
        rule.begin_pass({one.job.rid for one in self.running})
        for place, job in enumerate(self.queue):
            if budget <= 0 or len(self.running) >= self.rows:
                break
            chunks = 1 + -(-max(job.prompt - budget, 0) // self.chunk)
            size = {"chunks": chunks, "tokens": job.max_new}
            if blocked and self.order == "rule" and not rule.may_pass(job.rid, **size):
                continue
            cold = self.cold(job)
            if blocked and cold:
                self._pass_over(job, place, admitted)
                continue
            need, room = self.need(job), self.room()
            if need >= room:
                waits = need >= room + self.held_by(rule.overtakers(job.rid))
                if not blocked:
                    rule.stopped(job.rid, fcfs_waits=waits)
                if not cold or self.order == "fcfs":
                    break
                self._pass_over(job, place, admitted)
                blocked = True
                if self.order == "rule" and not rule.may_pass(None, chunks=1, tokens=1):
                    break
                continue
            budget -= self._start(job, budget, batch)
            self.passes += blocked
            rule.admit(job.rid, passing=blocked, **size)
            admitted.add(job.rid)
        self.queue = [job for job in self.queue if job.rid not in admitted]

    def _pass_over(self, job: Job, place: int, admitted: set[str]) -> None:
        started = len(self.rule._clocks)
        self.rule.passed_over(job.rid)
        if self.on_clock and len(self.rule._clocks) > started:
            queue = self.queue
            self.queue = [other for other in queue[: place + 1] if other.rid not in admitted]
            self.on_clock(self, len(self.queue), True)
            self.queue = queue

    def _start(self, job: Job, budget: int, batch: list[Running]) -> int:
        if job.adapter is not None:
            if job.adapter in self.resident:
                self.resident.remove(job.adapter)
            self.resident.append(job.adapter)
        one = Running(job, job.prompt, job.length)
        self.running.append(one)
        used, kept = self.used(), sum(self.sizes[name] for name in self.resident)
        tokens = sum(other.job.tokens for other in self.running)
        for name in list(self.resident):
            if kept + tokens <= self.pool:
                break
            if name not in used:
                self.resident.remove(name)
                kept -= self.sizes[name]
        self.waits[job.rid] = self.now - self.since[job.rid]
        return self._prefill(one, budget, batch)

    # -- runs -------------------------------------------------------------------------------------

    def run(self, jobs: list[Job]) -> Server:
        """Serve ``jobs``, in order of arrival, to the end."""
        coming = list(reversed(jobs))
        while coming or self.queue or self.running:
            while coming and coming[-1].arrival <= self.now:
                self.add(coming.pop())
            if not self.step():
                assert not self.queue, "a wait that cannot end"
                self.now = coming[-1].arrival
        return self

    def fcfs_from_here(self, ahead: int) -> int:
        """How long the request at place ``ahead`` (1: first) of the queue waits from now on if nobody passes."""
        rid = self.queue[ahead - 1].rid
        copy = Server(self.pool, self.sizes, self.chunk, self.rows, "fcfs")
        copy.queue = self.queue[:ahead]
        copy.since = dict.fromkeys((job.rid for job in copy.queue), 0)
        copy.running = [Running(one.job, one.prompt, one.left) for one in self.running]
        copy.resident = list(self.resident)
        while rid not in copy.waits:
            assert copy.step(), "a wait that cannot end"
        return copy.waits[rid]
