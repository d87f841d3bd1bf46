"""The parts of the overhead benchmark that need no server."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from elora_sglang.eval.fair import adapters_for_stock
from elora_sglang.eval.overhead import interval, make_jobs


def test_interval_of_known_ratios() -> None:
    mean, low, high = interval([0.5, 2.0])
    assert mean == pytest.approx(1.0)
    assert low * high == pytest.approx(1.0)
    # t(0.975, 1 degree of freedom) = 12.706, standard error of the logs = ln 2
    assert high == pytest.approx(2.0**12.7062, rel=1e-3)
    assert interval([0.9, 0.9, 0.9]) == pytest.approx((0.9, 0.9, 0.9))


def test_turns_extend_their_session_and_keep_its_adapter() -> None:
    jobs = make_jobs(random.Random(1), ["a", "b"], sessions=3, turns=2, rate=5.0, vocab=100)
    again = make_jobs(random.Random(1), ["a", "b"], sessions=3, turns=2, rate=5.0, vocab=100)
    assert jobs == again and len(jobs) == 6
    for first, second in zip(jobs[:3], jobs[3:], strict=True):
        assert first.lora == second.lora
        assert second.input_ids[: len(first.input_ids)] == first.input_ids
        assert len(second.input_ids) > len(first.input_ids)
    assert [job.at for job in jobs] == sorted(job.at for job in jobs)


def _adapter(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_stock_is_told_the_same_scaling(tmp_path: Path) -> None:
    plain = _adapter(tmp_path / "plain", r=8, lora_alpha=16)
    scaled = _adapter(tmp_path / "scaled", r=16, lora_alpha=32, use_rslora=True)
    stock = adapters_for_stock({"plain": plain, "scaled": scaled}, tmp_path / "stock")
    assert stock["plain"] == plain
    copy = json.loads((stock["scaled"] / "adapter_config.json").read_text())
    assert not copy["use_rslora"]
    assert copy["lora_alpha"] / copy["r"] == 32 / 16**0.5
    odd = _adapter(tmp_path / "odd", r=8, lora_alpha=16, use_rslora=True)
    with pytest.raises(ValueError, match="rescaled exactly"):
        adapters_for_stock({"odd": odd}, tmp_path / "none")
