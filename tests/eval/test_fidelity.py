"""The comparison of live and simulated figures: errors, aims, and the order of ELORA's events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from elora_sglang.core.costs import Costs
from elora_sglang.core.manager import CacheManager, SwapSettings
from elora_sglang.core.trace import Recorder, SizeFreePayloads
from elora_sglang.eval import fidelity


def pair(live_s: float, said_s: float, **order: Any) -> dict[str, Any]:
    live = {
        "requests": 10, "ttft_mean": live_s, "ttft_p99": 2 * live_s, "tpot_mean": 0.01,
        "hit_device": 0.5, "hit_host": 0.1,
    }  # fmt: skip
    said = {
        "ttft": {"mean": said_s, "p99": 2 * said_s},
        "tpot": {"mean": 0.01},
        "kv_hits": {"device": 0.5, "host": 0.1},
    }
    found = {"events": 9, "matches": 3, "recorded": [5, 1], "replayed": [5, 1], "difference": None} | order
    return {"live": {"summary": live, "order": found}, "predicted": said}


def test_errors_are_relative_to_the_live_server() -> None:
    found = {"stock": pair(0.2, 0.25), "elora": pair(0.1, 0.095, replayed=[4, 1])}
    assert fidelity.error(found["stock"]) == pytest.approx(0.25)
    aims = {aim.name: aim.ok for aim in fidelity.aims(found)}
    assert aims == {
        "stock: error of the mean TTFT": False,
        "stock: hits as recorded": True,
        "elora: error of the mean TTFT": True,
        "elora: hits as recorded": False,
    }
    assert [row[4] for row in fidelity.predictions(found)] == ["+25.0 %", "-5.0 %"]
    assert fidelity.orders(found)[1][3:5] == ["5 + 1", "4 + 1"]


@pytest.mark.parametrize("tampered", [False, True])
def test_eloras_order_is_replayed(tampered: bool, tmp_path: Path) -> None:
    from array import array

    lines: list[str] = []
    manager = CacheManager(1, 100, "lru", SizeFreePayloads(), SwapSettings(), Costs.default())
    Recorder(manager, lines.append)
    base = manager.tree.base
    for length in (3, 5):
        manager.match(base, array("q", range(length)))
        manager.insert(base, array("q", range(length)), None, length, length)
    if tampered:
        lines[3] = lines[3].replace("[2,3,2,0]", "[2,2,2,0]")
    path = tmp_path / "order.jsonl"
    path.write_text("\n".join(lines))
    found = fidelity.order("elora", path, 0)
    assert found["matches"] == 2 and found["events"] <= 4
    if tampered:
        assert found["difference"] and found["recorded"] != found["replayed"]
    else:
        assert found["difference"] is None and found["recorded"] == found["replayed"] == [3, 0]
