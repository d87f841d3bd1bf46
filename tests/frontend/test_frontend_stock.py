"""Programs that never say ``lora_path`` send, byte for byte, what they send without the import."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sglang as sgl
from support import live, stock_programs
from support.recording import Recorder, recording_server

import elora_sglang.frontend
from elora_sglang.frontend import hooks
from elora_sglang.patches.base import Fingerprint, manifest
from elora_sglang.patches.frontend import PATCHES


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    with recording_server() as found:
        yield found


@pytest.fixture(scope="module")
def stock() -> list[tuple[str, str, str, bytes]]:
    """What the programs send from a process that never imports ELORA."""
    with recording_server() as found:
        script = Path(stock_programs.__file__)
        done = subprocess.run(
            [sys.executable, str(script), found.url],
            env=live.clean_env(),
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Error in stream_executor" not in done.stderr, done.stderr[-3000:]
        return found.raw()


def test_same_bytes_with_the_import(recorder: Recorder, stock: list[tuple[str, str, str, bytes]]) -> None:
    assert elora_sglang.frontend.is_installed()
    stock_programs.run_all(recorder.url)
    assert len(stock) > 100
    assert any(path == "/concate_and_append_request" for _, path, _, _ in stock)
    assert any(path == "/v1/completions" for _, path, _, _ in stock)
    assert recorder.raw() == stock


def test_the_comparison_notices_an_adapter(
    recorder: Recorder, stock: list[tuple[str, str, str, bytes]]
) -> None:
    """Negative control: one default adapter, and the bytes differ."""
    stock_programs.run_all(recorder.url)
    extra = len(recorder.requests)
    endpoint = sgl.RuntimeEndpoint(recorder.url, lora_path="sql")
    stock_programs.plain.run("Why?", backend=endpoint).sync()
    assert recorder.raw() != stock
    assert b'"lora_path": "sql"' in recorder.requests[-1][3]
    assert len(recorder.requests) == extra + 2


def test_uninstall_takes_everything_back() -> None:
    wrapped = {p.target: p.load_target() for p in PATCHES}
    here = ModuleType("a_user_module")
    vars(here)["gen"] = sgl.gen
    sys.modules[here.__name__] = here
    try:
        elora_sglang.frontend.install()  # a second time: nothing is wrapped twice
        assert {p.target: p.load_target() for p in PATCHES} == wrapped
        elora_sglang.frontend.uninstall()
        for patch in PATCHES:
            original = patch.load_target()
            assert original is inspect.unwrap(wrapped[patch.target])
            assert original is not wrapped[patch.target]
        assert vars(here)["gen"] is sgl.gen is sgl.lang.api.gen
        with pytest.raises(TypeError, match="unexpected keyword argument 'lora_path'"):
            sgl.gen("x", lora_path="sql")
        elora_sglang.frontend.uninstall()  # nothing left to do
    finally:
        elora_sglang.frontend.install()
        del sys.modules[here.__name__]
    assert vars(here)["gen"] is sgl.gen
    assert sgl.gen("x", lora_path="sql").lora_path == "sql"


def test_names_imported_before_are_hooked_too(recorder: Recorder) -> None:
    script = (
        "from sglang import function, gen, select, RuntimeEndpoint\n"
        "import elora_sglang.frontend\n"
        "@function\n"
        "def program(s):\n"
        "    s += 'a' + gen('x', lora_path='sql') + select('y', choices=['b', 'c'], lora_path='legal')\n"
        f"program.run(backend=RuntimeEndpoint({recorder.url!r})).sync()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=live.clean_env(), capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert recorder.adapters() == ["sql", "legal", "legal"]


def test_help_shows_lora_path() -> None:
    for function in (sgl.gen, sgl.gen_int, sgl.gen_string, sgl.select, sgl.RuntimeEndpoint):
        parameter = inspect.signature(function).parameters["lora_path"]
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY


@pytest.fixture
def not_installed() -> Iterator[None]:
    elora_sglang.frontend.uninstall()
    yield
    elora_sglang.frontend.install()


@pytest.mark.usefixtures("not_installed")
def test_another_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    version = hooks.metadata.version
    for wrong in ("0.5.22", "0.5.24", "0.5.23.dev1"):
        monkeypatch.setattr(hooks.metadata, "version", lambda _, wrong=wrong: wrong)
        with pytest.raises(
            ImportError, match=rf"written for SGLang .*, installed is {wrong}; install"
        ) as error:
            elora_sglang.frontend.install()
        assert "\n" not in str(error.value)
    monkeypatch.setattr(hooks.metadata, "version", version)
    assert not elora_sglang.frontend.is_installed()


@pytest.mark.usefixtures("not_installed")
def test_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    target = PATCHES[-1].target
    changed: dict[str, Any] = {**manifest(), target: Fingerprint("(self, something)", "0")}
    monkeypatch.setattr(hooks, "manifest", lambda: changed)
    with pytest.raises(
        ImportError, match=r"role_end_generate takes \(self, s\), expected \(self, something\)"
    ):
        elora_sglang.frontend.install()
    assert not elora_sglang.frontend.is_installed()
    assert not hasattr(sgl.gen, "__wrapped__")
