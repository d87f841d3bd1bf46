"""Nobody waits for an adapter more than twice as long as in queue order: against a model, at depths of 1 to 1,000."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.overtaking_model import Job, Server

from elora_sglang.core.overtaking import Overtaking

SEED = 20_260


def world(seed: int, depth: int, gap: float | None = None) -> tuple[dict[str, Any], list[Job]]:
    """A server and ``depth`` requests, of which about half end before ``max_new``.

    ``gap``: batches between two arrivals, in the mean; 0: all at once; ``None``: differs from world to world.
    """
    rng = random.Random(seed)
    pool, adapters = rng.choice([300, 600, 1500]), rng.randint(2, 8)
    sizes = {f"a{i}": rng.randint(pool // 12, int(pool * 0.7)) for i in range(adapters)}
    base, longest, rate = rng.choice([0.1, 0.4, 0.8]), rng.choice([4, 20, 60]), rng.choice([0.2, 1, 5, 20])
    gap = rate if gap is None else gap
    jobs, now = [], 0
    for i in range(depth):
        name = None if rng.random() < base else f"a{min(int(rng.expovariate(0.5)), adapters - 1)}"
        room = pool - (sizes[name] if name else 0) - 3  # what it may take, as the server caps it
        new = min(rng.randint(1, longest * (3 if rng.random() < 0.2 else 1)), room // 2)
        prompt = min(rng.randint(1, 40), room - new)
        now += int(rng.expovariate(1 / gap)) if gap else 0
        length = rng.randint(1, new) if rng.random() < 0.7 else new
        jobs.append(Job(f"r{i}", now, name, prompt, new, length))
    server = {"pool": pool, "sizes": sizes, "chunk": rng.choice([16, 64, 256])}
    return {**server, "rows": rng.choice([4, 16, 64])}, jobs


@dataclass
class Totals:
    """What a number of worlds showed."""

    passes: int = 0
    deepest: int = 0
    beyond: int = 0
    worst_anybody: int = 0
    waits: dict[str, int] = field(default_factory=dict)
    ends: dict[str, int] = field(default_factory=dict)

    def add(self, jobs: list[Job], runs: dict[str, Server]) -> None:
        self.passes += runs["rule"].passes
        assert runs["rule"].passes == runs["rule"].rule.passes and runs["fcfs"].passes == 0
        for order, run in runs.items():
            assert len(run.waits) == len(jobs)
            self.waits[order] = self.waits.get(order, 0) + sum(run.waits.values())
            self.ends[order] = self.ends.get(order, 0) + run.now
        self.deepest = max(self.deepest, runs["rule"].deepest)
        rule, fcfs = runs["rule"].waits, runs["fcfs"].waits
        self.beyond += sum(rule[job.rid] > 2 * fcfs[job.rid] for job in jobs)
        over = (runs["anybody"].waits[job.rid] - 2 * fcfs[job.rid] for job in jobs)
        self.worst_anybody = max(self.worst_anybody, max(over))

    def report(self, title: str) -> None:
        wait = self.waits["rule"] / max(self.waits["fcfs"], 1)
        end = self.ends["rule"] / self.ends["fcfs"]
        print(
            f"{title}, up to {self.deepest} deep: {self.passes} passes, mean wait {wait:.2f} and makespan {end:.2f} "
            f"of FCFS; {self.beyond} requests beyond twice a whole run of FCFS; without the rule by up to "
            f"{self.worst_anybody} batches"
        )


@pytest.mark.parametrize(("depth", "worlds"), [(1, 20), (10, 200), (100, 20), (1000, 3)])
def test_a_burst_waits_at_most_twice_what_fcfs_gives(depth: int, worlds: int) -> None:
    """Everybody's clock starts together, so the bound holds for every request against one whole run of FCFS."""
    totals = Totals()
    for seed in range(SEED, SEED + worlds):
        server, jobs = world(seed, depth, 0)
        runs = {order: Server(**server, order=order).run(jobs) for order in ("rule", "fcfs", "anybody")}
        for job in jobs:
            wait, fcfs = runs["rule"].waits[job.rid], runs["fcfs"].waits[job.rid]
            assert wait <= 2 * fcfs, f"seed {seed}: {job} waits {wait}, under FCFS {fcfs}"
        totals.add(jobs, runs)
    totals.report(f"burst of {depth}, seeds {SEED} to {SEED + worlds - 1}")
    if depth >= 10:
        assert totals.passes > worlds
        assert totals.waits["rule"] < totals.waits["fcfs"]
        assert totals.ends["rule"] <= totals.ends["fcfs"]
        assert totals.worst_anybody > 20, "the negative control: without the rule the bound does not hold"


@pytest.mark.parametrize(("depth", "worlds", "every"), [(10, 150, 1), (100, 10, 2), (1000, 4, 40)])
def test_a_trickle_waits_at_most_twice_what_fcfs_gives(depth: int, worlds: int, every: int) -> None:
    """Each request is compared with FCFS from the state of the server at the moment when its clock started.

    One batch more where that is in the middle of a pass: the batch that this pass forms counts for us only.
    """
    totals, checked = Totals(), 0
    for seed in range(SEED, SEED + worlds):
        server, jobs = world(seed, depth, 0.5 if depth == 1000 else None)
        started: dict[str, tuple[int, int, bool]] = {}

        def clock(
            running: Server, ahead: int, in_pass: bool, started: dict[str, tuple[int, int, bool]] = started
        ) -> None:
            job = running.queue[ahead - 1]
            if int(job.rid[1:]) % every == 0:
                started[job.rid] = running.now, running.fcfs_from_here(ahead), in_pass

        runs = {order: Server(**server, order=order) for order in ("rule", "fcfs", "anybody")}
        runs["rule"].on_clock = clock
        for run in runs.values():
            run.run(jobs)
        for job in jobs:
            if job.rid not in started:
                continue
            start, fcfs, in_pass = started[job.rid]
            wait = job.arrival + runs["rule"].waits[job.rid] - start
            assert wait <= 2 * fcfs + in_pass, f"seed {seed}: {job} waits {wait}, under FCFS {fcfs}"
            checked += 1
        totals.add(jobs, runs)
    totals.report(f"trickle of {depth}, seeds {SEED} to {SEED + worlds - 1}, {checked} requests compared")
    assert checked > 10 and totals.passes > 0 and totals.deepest > 0.4 * depth
    assert totals.waits["rule"] <= 1.05 * totals.waits["fcfs"]
    assert totals.ends["rule"] <= 1.05 * totals.ends["fcfs"]


def waiting(*rids: str) -> Overtaking:
    """A queue of requests that wait for adapters."""
    rule = Overtaking()
    for rid in rids:
        rule.queue(rid, for_adapter=True)
    return rule


def decode(rule: Overtaking, batches: int, running: tuple[str, ...] = ()) -> None:
    for _ in range(batches):
        rule.batch(running, prefill=False, decode=True)


def test_who_waited_long_is_passed_by_short_ones_only() -> None:
    rule = waiting("r")
    rule.queue("q", for_adapter=False)
    for waited in range(12):
        rule.begin_pass(())
        rule.stopped("r", fcfs_waits=True)
        assert rule.may_pass("q", chunks=1, tokens=5) == (waited >= 5)
        assert rule.may_pass(None, chunks=1, tokens=5) == (waited >= 5)
        assert not rule.may_pass("q", chunks=1, tokens=50)
        decode(rule, 1)


def test_nobody_passes_whom_fcfs_would_have_admitted() -> None:
    rule = waiting("r")
    decode(rule, 1000)
    rule.begin_pass(())
    rule.stopped("r", fcfs_waits=False)
    assert not rule.may_pass("q", chunks=1, tokens=1)
    assert not rule.may_pass(None, chunks=1, tokens=0)


def test_the_youngest_clock_decides_but_not_ones_own() -> None:
    rule = waiting("r")
    decode(rule, 20)
    rule.queue("young", for_adapter=True)
    rule.queue("base", for_adapter=False)
    rule.begin_pass(())
    rule.stopped("r", fcfs_waits=True)
    assert not rule.may_pass("base", chunks=1, tokens=5)
    assert rule.may_pass("young", chunks=1, tokens=5)
    rule.leave("young")
    assert rule.may_pass("base", chunks=1, tokens=5)


def test_batches_that_only_overtakers_cause_are_lag() -> None:
    rule = waiting("r")
    decode(rule, 20)
    rule.queue("q", for_adapter=False)
    rule.begin_pass(())
    rule.stopped("r", fcfs_waits=True)
    rule.admit("q", chunks=1, tokens=5, passing=True)
    assert rule.overtakers("r") == ["q"] and rule.passes == 1
    rule.batch(["q"], prefill=True, decode=False)
    assert rule.lag == 1
    decode(rule, 1, ("q", "other"))
    assert rule.lag == 1, "FCFS waits as well"
    rule.begin_pass({"q"})
    rule.stopped("r", fcfs_waits=False)
    decode(rule, 2, ("q",))
    assert rule.lag == 3, "it waits for its overtaker"
    rule.batch(["q", "r2"], prefill=True, decode=False)
    assert rule.lag == 3, "a prefill that FCFS has as well"
    rule.begin_pass(())
    assert rule.overtakers("r") == []


def test_an_overtaker_that_runs_still_counts_for_the_next() -> None:
    """Twenty decodes of q and the prefill of a short one would both delay r, one after the other."""
    rule = waiting("r")
    decode(rule, 20)
    for rid in ("q", "short"):
        rule.queue(rid, for_adapter=False)
    rule.begin_pass(())
    rule.stopped("r", fcfs_waits=True)
    assert rule.may_pass("q", chunks=1, tokens=20)
    rule.admit("q", chunks=1, tokens=20, passing=True)
    rule.batch(["q"], prefill=True, decode=False)
    rule.begin_pass({"q"})
    rule.stopped("r", fcfs_waits=True)
    assert not rule.may_pass("short", chunks=1, tokens=1)
    rule.begin_pass(())
    rule.stopped("r", fcfs_waits=True)
    assert rule.may_pass("short", chunks=1, tokens=1), "q ended early"


def test_who_is_retracted_starts_anew_and_nothing_is_left_behind() -> None:
    rule = waiting(*(f"r{i}" for i in range(1000)))
    decode(rule, 10)
    rule.begin_pass(())
    rule.stopped("r0", fcfs_waits=True)
    rule.admit("r999", chunks=1, tokens=1, passing=True)
    rule.queue("r999", for_adapter=True)
    assert rule.overtakers("r0") == [] and rule.waiting == 1000
    for _ in range(5):
        for i in range(1000):
            rule.leave(f"r{i}")
            rule.queue(f"r{i}", for_adapter=True)
    for i in range(1000):
        rule.leave(f"r{i}")
    rule.leave("unknown")
    rule.passed_over("unknown")
    assert rule.waiting == 0 and not rule._clocks and not rule._overtakers and len(rule._latest) <= 64
