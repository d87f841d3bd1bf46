"""Seeds of the random tests: fixed in ``make test``, fresh in ``make test-nightly``, always repeatable.

* By default every run draws the same numbers, so the gate is never red by luck.
* ``ELORA_FRESH_SEEDS=1`` takes a new seed for each run of pytest.
* ``ELORA_TREE_SEED=N`` takes N, whatever else is set: this repeats a failure.

A test calls :func:`draw`, which prints the seed; pytest shows it when the test fails. Add the seed of a failure to
:data:`FAILED`, and it is a case from then on.
"""

from __future__ import annotations

import os
import secrets

#: Environment variables.
FRESH, REPEAT = "ELORA_FRESH_SEEDS", "ELORA_TREE_SEED"

#: The seed of ``make test``.
FIXED = 20260101

#: Seeds of two-tier lives (``test_tier_lives.py``) that failed once.
FAILED = (1852640303, 16)


def _choose() -> int:
    told = int(os.environ.get(REPEAT) or 0)
    if told:
        return told
    return 1 + secrets.randbelow(2**31 - 1) if fresh() else FIXED


def fresh() -> bool:
    """Whether this run draws numbers that no run drew before."""
    return os.environ.get(FRESH) == "1"


#: The seed of this run, below 2^31.
SEED = _choose()


def draw() -> int:
    """The seed of this run, printed with the way to repeat it."""
    print(f"seed {SEED}; repeat with {REPEAT}={SEED}")
    return SEED
