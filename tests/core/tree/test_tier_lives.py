"""Random lives on two tiers, under every policy, with and without the dependency of KV on its adapter."""

from __future__ import annotations

import random

import pytest
from support import seeds
from support.policy_bench import Bench
from support.two_tier_life import Independent, Memory

from elora_sglang.core.policies import create_policy, policy_names
from elora_sglang.core.policies.base import Policy


def live(memory: Memory, name: str, steps: int, check_every: int = 7) -> None:
    """``steps`` steps, checked; a failure says at which one."""
    for step in range(steps):
        try:
            memory.step()
            if step % check_every == 0:
                memory.check()
        except Exception as error:
            raise AssertionError(f"seed {name}, step {step}: {error!r}") from error


@pytest.mark.parametrize("page", [1, 4])
@pytest.mark.parametrize("policy", ["lru", "independent"])
@pytest.mark.parametrize("steps", [12_000, pytest.param(150_000, marks=pytest.mark.full)])
@pytest.mark.parametrize("seed", ["of this run", *seeds.FAILED])
def test_random_lives_keep_both_tiers_sound_and_their_bytes_right(
    page: int, steps: int, policy: str, seed: str | int
) -> None:
    name = f"{seeds.draw() if isinstance(seed, str) else seed}/{page}"
    chosen = Independent() if policy == "independent" else create_policy("lru")
    memory = Memory(random.Random(name), page, 60 * page, 90 * page, chosen)
    live(memory, name, steps)
    assert min(memory.counts.values()) >= steps // 2000, memory.counts


def bound(name: str, slots: int, *, dependency: bool) -> tuple[Bench, Policy]:
    """A policy and the view it is bound to."""
    bench = Bench(name, device=slots)
    bench.policy.dependency = dependency
    return bench, bench.policy


@pytest.mark.parametrize("dependency", [True, False])
@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("lives", [1, pytest.param(40, marks=pytest.mark.full)])
def test_whoever_may_leave_a_tier_is_a_candidate_under_every_policy(
    policy: str, dependency: bool, lives: int
) -> None:
    for number in range(lives):
        for page in (1, 4, 16):
            name = f"{seeds.draw() + number}/{page}/{policy}/{dependency}"
            bench, chosen = bound(policy, 60 * page, dependency=dependency)
            rng = random.Random(name)
            memory = Memory(rng, page, 60 * page, 90 * page, chosen, lock_host_copies=True)
            bench.tree = memory.tree
            for round in range(20):
                live(memory, f"{name}, round {round}", 40, check_every=2)
                bench.at(round * 3.7)
