"""The plugin in its processes: what SGLang's loader calls, and what a launch with a bad flag prints."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.managers.scheduler  # noqa: F401  SGLang's modules import each other; this order works
from support import live

from elora_sglang.integration.plugin import config, verify
from elora_sglang.integration.plugin import entry as plugin
from elora_sglang.integration.plugin import install as plugin_hooks
from elora_sglang.integration.plugin import launch as engine
from elora_sglang.integration.plugin.config import EloraConfig
from elora_sglang.patches.base import discover


@pytest.fixture(autouse=True)
def stock_afterwards(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(config.ENV_ENABLED, "0")
    monkeypatch.setenv(config.ENV_LAUNCHER, "0")
    yield
    plugin_hooks.uninstall(discover())


def as_child_of(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(pid=pid))


def test_the_entry_point_is_registered() -> None:
    found = [e for e in metadata.entry_points(group="sglang.srt.plugins") if e.name == "elora"]
    assert [e.load() for e in found] == [plugin.register]


def test_the_launcher_gets_the_command_line_only() -> None:
    plugin.register()
    assert plugin_hooks.installed_names() >= {"cli_arguments", "cli_config"}
    assert not plugin_hooks.installed_names() & {p.name for p in verify.scheduler_patches()}
    assert os.environ[config.ENV_LAUNCHER] == str(os.getpid())


@pytest.mark.parametrize("enabled", [True, False])
def test_a_scheduler_process_is_hooked_when_its_launcher_says_so(
    enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(config.ENV_LAUNCHER, "4711")
    monkeypatch.setenv(config.ENV_ENABLED, str(int(enabled)))
    as_child_of(4711, monkeypatch)
    plugin.register()
    hooked = {p.name for p in verify.scheduler_patches()} <= plugin_hooks.installed_names()
    assert hooked is enabled


def test_a_server_started_as_a_command_is_no_child_of_the_process_it_inherits_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(config.ENV_LAUNCHER, "4711")
    monkeypatch.setenv(config.ENV_ENABLED, "1")
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: None)
    assert config.announce_launcher() is False
    assert not config.launcher_enabled()


def test_a_fault_in_the_plugin_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(plugin, "_register", fail)
    with pytest.raises(SystemExit, match="elora: the plugin could not be set up: RuntimeError: planted"):
        plugin.register()


def test_engine_takes_elora_keywords_and_its_schedulers_are_hooked() -> None:
    from sglang.srt.entrypoints.engine import Engine

    before = vars(Engine)["server_args_class"], vars(Engine)["run_scheduler_process_func"]
    plugin.register()
    records = [p for p in discover() if p.name in ("engine_arguments", "engine_schedulers")]
    verify.require_in_place(records)
    made = Engine.server_args_class(model_path="model", elora=True, elora_adapter_names="stock", page_size=16)
    assert config.current(made) == EloraConfig(enabled=True, adapter_names="stock")
    assert made.page_size == 16
    assert Engine.run_scheduler_process_func is engine.run_scheduler_process
    assert config.launcher_enabled()
    stock = Engine.server_args_class(model_path="model")
    assert not config.current(stock).enabled
    assert not config.launcher_enabled(), "children of a stock engine must stay stock"
    with pytest.raises(ValueError, match="unknown ELORA setting"):
        Engine.server_args_class(model_path="model", elora=True, elora_polcy="lru")
    plugin_hooks.uninstall(records)
    assert (vars(Engine)["server_args_class"], vars(Engine)["run_scheduler_process_func"]) == before


def test_an_engine_whose_schedulers_another_plugin_starts_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.entrypoints.engine import Engine

    def theirs(*args: Any) -> None: ...

    monkeypatch.setattr(Engine, "run_scheduler_process_func", staticmethod(theirs))
    plugin.register()
    assert Engine.run_scheduler_process_func is theirs


def test_a_stock_engine_after_an_elora_engine_has_no_hooks() -> None:
    from sglang.srt.server_args import ServerArgs

    engine.apply_settings(ServerArgs(model_path="model"), EloraConfig(enabled=True))
    engine.install_tokenizer_hooks()
    assert plugin_hooks.installed_names() >= {"final_checks", "tokenizer_manager"}
    engine.apply_settings(ServerArgs(model_path="model"), EloraConfig())
    assert not plugin_hooks.installed_names()
    engine.apply_settings(ServerArgs(model_path="model"), EloraConfig(enabled=True))
    engine.install_tokenizer_hooks()
    verify.require_in_place([p for p in discover() if p.name in plugin_hooks.installed_names()])


def test_a_forked_scheduler_installs_what_the_loader_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers import scheduler

    served: list[Any] = []
    monkeypatch.setattr(scheduler, "run_scheduler_process", lambda *args: served.append(args))
    elora = SimpleNamespace(_elora=EloraConfig(enabled=True))
    engine.run_scheduler_process(elora, "ports")
    assert served == [(elora, "ports")]
    verify.require_hooks(EloraConfig(enabled=True))


def test_the_scheduler_checks_its_hooks_before_it_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers import scheduler

    monkeypatch.setattr(scheduler, "configure_scheduler_process", scheduler.configure_scheduler_process)
    engine.install_scheduler_hooks()
    victim = next(p for p in verify.scheduler_patches() if p.name == "bind_pool")
    plugin_hooks.uninstall([victim])
    with pytest.raises(SystemExit, match="_init_post_memory_pool_components is not in place"):
        scheduler.configure_scheduler_process(SimpleNamespace(_elora=EloraConfig(enabled=True)), 0)


def test_a_scheduler_of_another_class_is_refused_by_name() -> None:
    from sglang.srt.managers.scheduler import Scheduler

    class TheirScheduler(Scheduler):
        def __init__(self) -> None:
            verify.require_hooks(EloraConfig(enabled=True), SimpleNamespace())

    engine.install_scheduler_hooks()
    verify.require_hooks(EloraConfig(enabled=True), SimpleNamespace(**{verify.MARK: object}))
    with pytest.raises(SystemExit, match=r"the scheduler is .*\.TheirScheduler, not EloraScheduler"):
        TheirScheduler()


def test_a_tokenizer_manager_of_another_class_is_refused_by_name() -> None:
    from elora_sglang.integration.adapters import tokenizer
    from elora_sglang.integration.adapters.tokenizer import EloraTokenizerManager

    class TheirManager:
        pass

    args = SimpleNamespace(_elora=EloraConfig(enabled=True))
    ours = EloraTokenizerManager.__new__(EloraTokenizerManager)
    for manager in (ours, None):
        tokenizer.at_tokenizer_start((manager,), object, server_args=args)
    tokenizer.at_tokenizer_start((TheirManager(),), object, server_args=SimpleNamespace())
    with pytest.raises(
        SystemExit, match=r"the tokenizer manager is .*TheirManager, not EloraTokenizerManager"
    ):
        tokenizer.at_tokenizer_start((TheirManager(),), object, server_args=args)


def write_model(folder: Path, architecture: str, **more: Any) -> Path:
    """A model folder that is complete enough to be refused: a configuration without weights."""
    folder.mkdir()
    settings = {
        "architectures": [f"{architecture}ForCausalLM"],
        "model_type": architecture.lower(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "torch_dtype": "float32",
        **more,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("command", "flags", "expected"),
    [
        (
            [sys.executable, "-m", "sglang.launch_server"],
            ["--elora", "--pp-size", "2"],
            "--pp-size above 1 does not work with --elora",
        ),
        (
            [str(Path(sys.executable).with_name("sglang")), "serve"],
            ["--elora", "--enable-hicache"],
            "--enable-hierarchical-cache does not",
        ),
        (
            [sys.executable, "-m", "sglang.launch_server"],
            ["--elora"],
            "a mixture-of-experts (MoE) model does not work with --elora",
        ),
    ],
    ids=["launch_server", "sglang serve", "model"],
)
def test_a_launch_is_refused_with_one_line_and_a_status(
    command: list[str], flags: list[str], expected: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model", "Mixtral", num_local_experts=4)
    done = subprocess.run(
        [*command, "--model-path", str(model), "--device", "cpu", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=live.clean_env(),
    )
    assert done.returncode not in (0, None)
    said = [line for line in done.stderr.splitlines() if line.startswith("elora: ")]
    assert len(said) == 1, done.stderr[-3000:]
    assert expected in said[0]


BROKEN_LAUNCH = """
import os, sys
from elora_sglang.patches import base
if __name__ == "__mp_main__":  # a spawned process: it does not know one target any more
    base.manifest().pop("sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class")
if __name__ == "__main__":
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree
    load_plugins()
    try:
        run_server(prepare_server_args(sys.argv[1:]))
    finally:  # as sglang.launch_server does
        kill_process_tree(os.getpid(), include_parent=False)
"""


def test_a_scheduler_that_cannot_be_hooked_ends_the_server(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "Llama")
    (tmp_path / "launch.py").write_text(BROKEN_LAUNCH)
    arguments = [
        "--elora",
        "--model-path",
        str(model),
        "--skip-tokenizer-init",
        "--port",
        str(live.free_port()),
    ]
    status, output = live.run(
        [sys.executable, str(tmp_path / "launch.py"), *arguments], log=tmp_path / "log", timeout=600
    )
    assert status not in (0, 124), output[-3000:]
    said = [line for line in output.splitlines() if line.startswith("elora: ")]
    assert len(said) == 1, output[-3000:]
    assert "Scheduler.get_prefill_adder_class has no entry" in said[0]


def test_the_flags_show_in_the_help_of_launch_server(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sglang.launch_server", "--help"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=live.clean_env(),
    )
    assert done.returncode == 0
    for flag in ("--elora ", "--elora-policy", "--elora-adapter-names"):
        assert flag in done.stdout
