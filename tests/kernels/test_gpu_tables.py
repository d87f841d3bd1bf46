"""From the figures of the GPU scripts to tables, aims and pictures, on made-up figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from elora_sglang.eval.gpu import kernel_bench, timing
from elora_sglang.eval.pages import figures, page


def result(seconds: float = 1e-4, copy_seconds: float = 1e-3) -> dict[str, Any]:
    """40 adapters whose 300 MB move in ``seconds``, beside peers that take 1e-4; copies of 50 MB."""
    lora = [
        {
            "load": load, "rows": 128, "skew": 0.0, "distinct": 40, "bytes": 3e8, "seconds": seconds,
            "slot_buffer_seconds": 1e-4, "segment_gemm_seconds": None,
        }
        for load in ("40 of rank 16", "40 of ranks 8 to 64")
    ]  # fmt: skip
    copies = [
        {"way": way, "slots": 256, "per_program": per, "bytes": 50_000_000, "seconds": copy_seconds * per}
        for way in ("to the device", "to the host")
        for per in (1, 4)
    ]
    ceilings = {"copy_bytes_s": 3.2e12, "to_device_bytes_s": 55e9, "to_host_bytes_s": 50e9}
    return {"lora": lora, "copies": copies, "ceilings": ceilings}


def test_aims_say_what_was_met_and_what_was_not() -> None:
    found = {aim.name: aim for aim in kernel_bench.aims(result())}
    values = [round(aim.value, 3) for aim in found.values()]
    assert values == [0.938, 1.0, 1.0, 0.909, 1.0]
    assert [aim.ok for aim in found.values()] == [True, True, False, True, True]
    slower = kernel_bench.aims(result(seconds=1.2e-4, copy_seconds=2e-3))
    assert not any(aim.ok for aim in slower)


def test_tables_take_the_best_size_of_a_copy_and_say_what_was_not_compared() -> None:
    lora, copies = kernel_bench.tables(result())
    assert list(lora.rows[1])[-3:] == ["94%", "1.00x", "not compared"]
    assert [row[4:] for row in copies.rows] == [[1, "91%"], [1, "100%"]]


def test_the_report_shows_what_finish_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = result()
    out = tmp_path / "kernels.json"
    timing.finish(
        out, "Kernels", kernel_bench.tables(data), kernel_bench.aims(data), data, torch.device("cpu")
    )
    assert "MISSED" in capsys.readouterr().out
    section = page.section(out, json.loads(out.read_text()))
    assert "triton: " in section.note and len(section.aims) == 5
    assert [len(part.images) for part in section.parts] == [2, 1]


def test_nothing_is_drawn_of_what_was_not_compared() -> None:
    data = result()
    for one in data["lora"]:
        one["slot_buffer_seconds"] = None
    assert figures.over_slots(data["lora"]) is None and figures.bandwidth([], 1.0) is None
    assert [aim.name for aim in kernel_bench.aims(data)][1].startswith("row copies")


def test_no_batch_begins_after_its_time() -> None:
    jobs = [lambda number=number: {"number": number} for number in range(3)]
    assert kernel_bench._within(0.0, iter(jobs)) == [{"number": 0}]
    assert len(kernel_bench._within(60.0, iter(jobs))) == 3
