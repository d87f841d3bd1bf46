"""When the platform is on, which threads it takes, and that it leaves other machines alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.managers.scheduler  # noqa: F401  only SGLang calls the platform; this order works
import torch
from support import live

import elora_sglang.platform as platform_entry
from elora_sglang.patches.base import SUPPORTED_SGLANG
from elora_sglang.platform import threads as worker_threads
from elora_sglang.platform.pinning import NoPinning, without_pinning


def test_entry_point_is_installed() -> None:
    found = [e for e in entry_points(group="sglang.srt.platforms") if e.name == "elora_cpu"]
    assert [e.value for e in found] == ["elora_sglang.platform:activate"]


def test_on_where_there_is_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(platform_entry, "_accelerator_available", lambda: False)
    assert platform_entry.activate() == platform_entry.PLATFORM_CLASS


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_off_where_there_is_one(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(getattr(torch, name), "is_available", lambda: True)
    assert platform_entry.activate() is None


def test_off_for_a_vendor_module_that_torch_learned_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(torch, "npu", SimpleNamespace(is_available=lambda: True), raising=False)
    assert platform_entry.activate() is None


def test_off_when_sglangs_own_cpu_engine_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platform_entry.activate() is None


@pytest.fixture
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    monkeypatch.setattr(platform_entry, "_accelerator_available", lambda: False)


@pytest.mark.parametrize("version", ["0.5.19", "0.5.21", "0.5.22", "0.6.0"])
def test_steps_aside_for_another_version_of_sglang(
    version: str, no_accelerator: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    info = tmp_path / f"sglang-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sglang\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert platform_entry.activate() is None
    (line,) = [r.getMessage() for r in caplog.records if r.name == platform_entry.__name__]
    assert line == (
        f"elora: the CPU platform is off: it was written for SGLang {SUPPORTED_SGLANG}, installed is {version}"
    )


def test_steps_aside_where_sglang_lacks_what_it_imports(
    no_accelerator: None, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(platform_entry, "NEEDS", (*platform_entry.NEEDS, "sglang.srt.not_there"))
    assert platform_entry.activate() is None
    assert "lacks what it needs: ModuleNotFoundError: No module named 'sglang.srt.not_there'" in caplog.text


def test_sglang_takes_it_and_keeps_its_settings() -> None:
    """In a clean process: the platform is SGLang's, and fills only what was left open."""
    script = """
import json
from types import SimpleNamespace
from sglang.srt.platforms import current_platform
def settings(**given):
    args = dict(max_total_tokens=None, max_running_requests=None, disable_custom_all_reduce=False, dtype="auto",
                mem_fraction_static=None, model_path="none", lora_backend="csgmv", enable_lora=None, lora_paths=None,
                tp_size=1, pp_size=1, dp_size=1)
    args = SimpleNamespace(**{**args, **given})
    current_platform.apply_server_args_defaults(args)
    return vars(args)
print(json.dumps({
    "class": type(current_platform).__name__,
    "oot": current_platform.is_out_of_tree(),
    "pin": current_platform.is_pin_memory_available(),
    "open": settings(),
    "given": settings(
        max_total_tokens=99, max_running_requests=3, mem_fraction_static=0.5, dtype="bfloat16", lora_backend="elora"
    ),
}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240, env=live.clean_env()
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["class"] == "EloraCpuPlatform"
    assert found["oot"]
    assert not found["pin"]
    assert found["open"]["max_total_tokens"] == 32768
    assert found["open"]["max_running_requests"] == 32
    assert found["open"]["mem_fraction_static"] == 0.8
    assert found["open"]["lora_backend"] == "torch_native"
    assert found["open"]["disable_custom_all_reduce"]
    given = found["given"]
    assert (given["max_total_tokens"], given["max_running_requests"]) == (99, 3)
    assert given["mem_fraction_static"] == 0.5
    assert (given["dtype"], given["lora_backend"]) == ("bfloat16", "elora")


@pytest.mark.parametrize(
    ("cores", "ranks", "chosen", "threads"),
    [
        (2, 1, None, 1),
        (4, 2, None, 1),
        (16, 1, None, 8),
        (16, 2, None, 4),
        (6, 8, None, 1),
        (16, 1, "3", None),
    ],
)
def test_default_threads(cores: int, ranks: int, chosen: str | None, threads: int | None) -> None:
    assert worker_threads.default_threads(cores, ranks, chosen) == threads


@pytest.mark.parametrize(
    ("cores", "ranks", "text"),
    [([0, 1], 2, "0|1"), ([0, 1, 2, 3], 2, "0,1|2,3"), ([4], 2, "4|4"), ([0, 2, 4], 2, "0|2")],
)
def test_ranks_are_told_their_cores(
    monkeypatch: pytest.MonkeyPatch, cores: list[int], ranks: int, text: str
) -> None:
    monkeypatch.setenv(worker_threads.BINDING, "")
    monkeypatch.setattr(worker_threads, "usable_cores", lambda: cores)
    worker_threads.bind_ranks(1)
    assert worker_threads.bound_ranks() == 1
    worker_threads.bind_ranks(ranks)
    assert os.environ[worker_threads.BINDING] == text
    assert worker_threads.bound_ranks() == ranks
    worker_threads.bind_ranks(3)
    assert os.environ[worker_threads.BINDING] == text, "what is set already is the user's"


def test_threads_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook leaves the compiled call out where there is none, and calls it where there is."""
    called = []
    worker_threads.without_kernel_threads(lambda **given: called.append(given), local_omp_cpuid="0")
    assert called == []
    monkeypatch.setattr(torch.ops, "sgl_kernel", SimpleNamespace(init_cpu_threads_env=None))
    worker_threads.without_kernel_threads(lambda **given: called.append(given), local_omp_cpuid="0")
    assert called == [{"local_omp_cpuid": "0"}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinning works where there is a GPU")
def test_pinning_is_left_out() -> None:
    """Both spellings fail in plain torch here, and do nothing inside the hook."""
    with pytest.raises(RuntimeError):
        torch.zeros(3, pin_memory=True)

    def pins(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, pin_memory=True) + torch.zeros(2, pin_memory=True).pin_memory()

    assert without_pinning(pins, [1, 2]).tolist() == [1.0, 2.0]
    with NoPinning():
        assert torch.arange(3, pin_memory=True).tolist() == [0, 1, 2]
