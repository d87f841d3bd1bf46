"""The parts of the overhead benchmark that need no server."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from elora_sglang.eval.overhead import ANSWER_TOKENS, lanes
from elora_sglang.eval.serving.launch import adapters_for_stock
from elora_sglang.eval.workloads.model import prompts, tokens


def test_turns_extend_their_session_by_fixed_content() -> None:
    found, again = (lanes(random.Random(1), adapters=2, sessions=3, turns=2, rate=5.0) for _ in range(2))
    assert found == again and [session.adapter for (session,) in found] == [0, 1, 0]
    for (session,) in found:
        (first, answer), (second, _) = prompts(session)
        assert second[: len(first)] == first and answer not in second, "another answer makes no other prompt"
        assert 60 <= tokens(first) < 180 and 20 <= tokens(second) - tokens(first) < 60
        assert answer.tokens == ANSWER_TOKENS
    times = [session.turns[turn].at for turn in range(2) for (session,) in found]
    assert times == sorted(times)
    assert len({piece.id for (session,) in found for turn in session.turns for piece in turn.new}) == 6


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
