"""``python -m elora_sglang doctor``: what it finds, and that it says no for a reason."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from support import live
from support.sglang_copy import Plant, SGLangCopy

from elora_sglang import doctor
from elora_sglang.integration.plugin import verify
from elora_sglang.patches import base
from elora_sglang.patches.base import discover
from elora_sglang.patches.surface import place, record, start

ROW_LAYER = "sglang.srt.lora.layers.RowParallelLinearWithLoRA"


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "elora_sglang", "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=cwd,
        env=live.clean_env(),
    )


def test_a_sound_installation_is_ready() -> None:
    done = run("--json", cwd=live.ROOT)
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"], report["reasons"]) == (0, True, [])
    assert report["versions"]["sglang"] == metadata.version("sglang")
    assert report["sglang_in_range"]
    assert report["platform"]
    assert all(report["entry_points"].values())
    assert "site-packages" in report["kernels_package"]
    assert {hook["name"] for hook in report["hooks"]} == {p.name for p in discover()}
    assert all(hook["would_apply"] and hook["hash_ok"] for hook in report["hooks"])
    assert report["surface"] == f"breaks: 0, look at: 0, unchanged: {len(record.stored().entries)}"


def test_a_folder_that_hides_the_kernels_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    report = doctor.Report()
    doctor._kernels(report)
    assert len(report.reasons) == 1
    assert str(tmp_path / "kernels") in report.reasons[0]


@pytest.mark.parametrize("version", ["0.5.22", "0.5.24", None])
def test_another_sglang_is_a_reason(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version

    def pretended(name: str) -> str:
        if name != "sglang":
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", pretended)
    report = doctor.examine()
    assert not report.sglang_in_range
    assert not report.hooks
    assert any("pip install 'sglang>=0.5.23,<0.5.24'" in reason for reason in report.reasons)


def test_a_missing_entry_point_and_a_whitelist_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(**_: Any) -> list[Any]:
        return []

    monkeypatch.setattr(metadata, "entry_points", none)
    monkeypatch.setenv("SGLANG_PLUGINS", "other, another")
    monkeypatch.setenv("SGLANG_PLATFORM", "somebody_elses")
    report = doctor.Report()
    doctor._entry_points(report)
    assert [reason.split(" ")[0] for reason in report.reasons] == [
        "entry", "entry", "SGLANG_PLUGINS", "SGLANG_PLATFORM=somebody_elses",
    ]  # fmt: skip


def test_a_fault_shows_in_the_status_and_the_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from elora_sglang.__main__ import main

    faulty = doctor.Report(reasons=["planted"])
    monkeypatch.setattr(doctor, "examine", lambda sglang: faulty)
    assert main(["doctor"]) == 1
    assert "fault: planted" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    monkeypatch.setattr(doctor, "examine", lambda sglang: doctor.Report())
    assert main(["doctor"]) == 0


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> SGLangCopy:
    """What we use of SGLang, said to be 0.5.22; the difference that matters there is planted by the tests."""
    return SGLangCopy(tmp_path_factory.mktemp("older"), "0.5.22")


def without_offsets(plant: Plant) -> None:
    """What 0.5.22 lacks, where the server dies in `EloraLoRAMemoryPool`."""
    plant.edit(ROW_LAYER, r"self\.lora_offsets = ", "self.offsets = ")


def test_another_sglang_is_looked_at_without_importing_it(
    older: SGLangCopy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from elora_sglang.__main__ import main

    # The range of versions is widened: what is said must come from the source.
    monkeypatch.setattr(base, "SUPPORTED_SGLANG", ">=0.5.22,<0.5.24")
    assert main(["doctor", "--sglang", str(older.package)]) == 0
    with older.planted() as plant:
        without_offsets(plant)
        assert main(["doctor", "--sglang", str(older.package.parent), "--json"]) == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out[captured.out.index("\n{") :])
    assert report["versions"]["sglang"] == "0.5.22"
    assert len(report["reasons"]) == 1
    assert report["reasons"][0].startswith(f"{ROW_LAYER}.lora_offsets: gone")
    assert "elora_sglang/integration/weights/shards.py" in report["reasons"][0]
    assert all(hook["would_apply"] for hook in report["hooks"])


def test_an_installed_0_5_22_is_not_ready_and_says_why(
    older: SGLangCopy, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.5.22" if name == "sglang" else real(name))
    monkeypatch.setattr(place, "installed", lambda: older.package)
    with older.planted() as plant:
        without_offsets(plant)
        report = doctor.examine()
    assert any(reason.startswith("sglang 0.5.22 is not supported") for reason in report.reasons)
    assert any(f"{ROW_LAYER}.lora_offsets: gone" in reason for reason in report.reasons)
    assert doctor.render(report).endswith("not ready: see the faults above")


@pytest.mark.parametrize(
    ("name", "pattern", "new", "says"),
    [
        (
            "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache._evict",
            r"def _evict",
            "def _evict_some",
            "eval's baselines (eval live --compare) will not run",
        ),
        (
            "sglang.lang.ir.SglFunction.bind",
            r"def bind",
            "def bind_some",
            "import elora_sglang.frontend will not work",
        ),
    ],
)
def test_what_only_another_part_needs_is_a_note(
    older: SGLangCopy, monkeypatch: pytest.MonkeyPatch, name: str, pattern: str, new: str, says: str
) -> None:
    monkeypatch.setattr(base, "SUPPORTED_SGLANG", ">=0.5.22,<0.5.24")
    with older.planted() as plant:
        plant.edit(name, pattern, new)
        report = doctor.examine(str(older.package))
    assert report.reasons == []
    assert any(note.startswith(f"{says}: {name}: gone") for note in report.notes)
    ours = {patch.target for patch in base.discover()}  # eval's baselines have records of their own
    assert [hook.target for hook in report.hooks if not hook.would_apply] == [name] * (name in ours)


def test_the_start_refuses_what_is_gone_and_warns_of_other_source(
    older: SGLangCopy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(place, "installed", lambda: older.package)
    adder = "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req"
    try:
        with older.planted() as plant:
            plant.edit(adder, r"\Z", "\n        self.quite_new = 1\n")
            start.faults.cache_clear()
            verify.check_surface()
            assert f"{adder}: source changed" in caplog.text
            without_offsets(plant)
            start.faults.cache_clear()
            with pytest.raises(
                verify.Refused, match=r"lora_offsets: gone.*Run python -m elora_sglang doctor"
            ):
                verify.check_surface()
    finally:
        start.faults.cache_clear()


@pytest.mark.full
def test_the_real_0_5_22_is_not_ready() -> None:
    """Downloads the wheel from the registry: needs the network."""
    done = run("--sglang", "0.5.22", "--json", cwd=live.ROOT)
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert any(f"{ROW_LAYER}.lora_offsets: gone" in reason for reason in report["reasons"])
