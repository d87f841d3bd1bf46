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

from elora_sglang import doctor
from elora_sglang.patches.base import discover


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
    monkeypatch.setattr(doctor, "examine", lambda: faulty)
    assert main(["doctor"]) == 1
    assert "fault: planted" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    monkeypatch.setattr(doctor, "examine", doctor.Report)
    assert main(["doctor"]) == 0
