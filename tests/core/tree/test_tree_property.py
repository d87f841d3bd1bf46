"""Random lives of the tree against the naive model: 10^5 operations in ``make test``.

    python -m pytest -m full tests/core/tree/test_tree_property.py

runs 10^6 (part of ``make test-full``). How a failure is repeated: :mod:`support.seeds`.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from support import seeds
from support.tree_driver import Driver

from elora_sglang.core.policies import create_policy, policy_names

OPERATIONS = [100_000, pytest.param(1_000_000, marks=pytest.mark.full)]
SHAPES = [(1, 60), (1, 200), (16, 60 * 16), (16, 200 * 16)]
CHECK_EVERY = 40
# The naive model knows no adapter that leaves while its KV stays; `static` has tests of its own.
DEPENDENT = [name for name in policy_names() if create_policy(name).dependency]


@pytest.mark.parametrize(("page_size", "pool"), SHAPES)
@pytest.mark.parametrize("operations", OPERATIONS)
@pytest.mark.timeout(3600)
def test_random_life_equals_the_naive_model(operations: int, page_size: int, pool: int) -> None:
    seed = seeds.draw()
    for policy in DEPENDENT:
        name = f"{seed}/{page_size}/{pool}/{policy}"
        rng = random.Random(name)
        driver = Driver(page_size, create_policy(policy), is_lru=policy == "lru", pool=pool)
        share = operations // len(SHAPES) // len(DEPENDENT)
        for step in range(share):
            try:
                driver.step(rng)
                if step % CHECK_EVERY == 0:
                    driver.check()
            except Exception as error:
                text = f"seed {name}, step {step}: {error}"
                raise AssertionError(text) from error
        # A life in which nothing had to leave would prove little.
        assert min(driver.evicted.values()) >= share // 200, driver.evicted


class TreeLife(RuleBasedStateMachine):
    """The same operations, chosen by hypothesis, which shrinks a failing life to its shortest form."""

    @initialize(page_size=st.sampled_from([1, 16]), policy=st.sampled_from(DEPENDENT))
    def start(self, page_size: int, policy: str) -> None:
        self.driver = Driver(page_size, create_policy(policy), is_lru=policy == "lru", pool=40 * page_size)

    @rule(name=st.sampled_from([name for name, _ in Driver.OPERATIONS]), seed=st.integers(0, 2**16))
    def operate(self, name: str, seed: int) -> None:
        getattr(self.driver, name)(random.Random(seed))
        self.driver.compare()
        self.driver.check()


TestTreeLife = TreeLife.TestCase
TestTreeLife.settings = settings(
    max_examples=40, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
)
