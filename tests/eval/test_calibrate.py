"""Fitting a machine profile to timings: known constants come back, and too little data is refused."""

from __future__ import annotations

import random

import pytest

from elora_sglang.eval.calibrate import SHOWN, Measured, fit

FRONT, TOKEN, TOKEN2 = 4e-3, 1.5e-3, 2e-7
STEP, REQUEST, CONTEXT, RANK = 15e-3, 2e-3, 3e-6, 4e-5


def measured(noise: float, rng: random.Random) -> Measured:
    def seen(seconds: float) -> float:
        return seconds * (1 + rng.uniform(-noise, noise))

    prefills = [(n, seen(FRONT + n * TOKEN + n * (n - 1) / 2 * TOKEN2)) for n in (64, 256, 1024, 2048)]
    decodes = [
        (batch, batch * prompt, ranks, seen(STEP + batch * REQUEST + batch * prompt * CONTEXT + ranks * RANK))
        for batch in (1, 2, 4, 8)
        for prompt in (56, 536)
        for ranks in (0, 32, 32 * batch)
    ]
    return Measured(prefills, decodes)


def test_known_constants_come_back() -> None:
    found = fit(measured(0.0, random.Random(0)))
    assert found.constants == pytest.approx({
        "front_s": FRONT, "prefill_token_s": TOKEN, "prefill_token2_s": TOKEN2,
        "step_s": STEP, "step_request_s": REQUEST, "step_context_s": CONTEXT, "step_rank_s": RANK,
    })  # fmt: skip
    assert set(SHOWN) == set(found.constants)
    assert found.prefill_error == pytest.approx(0.0, abs=1e-9)


def test_noise_moves_them_by_about_as_much() -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    found = fit(measured(0.03, random.Random(seed)))
    assert found.constants["prefill_token_s"] == pytest.approx(TOKEN, rel=0.1)
    assert found.constants["step_s"] == pytest.approx(STEP, rel=0.15)
    assert 0 < found.decode_error < 0.03 and min(found.constants.values()) >= 0


def test_too_little_is_refused() -> None:
    data = measured(0.0, random.Random(0))
    with pytest.raises(ValueError, match="at least three prompt lengths"):
        fit(Measured(data.prefills[:2], data.decodes))
