"""Every patch record: it applies, taking it back restores, another SGLang is refused.

``tests/integration/plugin/test_plugin_live.py`` shows that a server reaches each hook and each override.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sglang.srt.managers.scheduler  # noqa: F401  SGLang's modules import each other; this order works
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from elora_sglang.integration.plugin import install as plugin_hooks
from elora_sglang.integration.plugin import verify
from elora_sglang.patches import table
from elora_sglang.patches.base import (
    Kind,
    Patch,
    Process,
    When,
    discover,
    overrides,
    select,
    serving,
    signature_of,
)

RECORDS = discover()
BY_NAME = pytest.mark.parametrize("patch", RECORDS, ids=lambda p: p.name)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    # Another test of this process may have loaded SGLang's plugins and put the targets back by other means:
    # SGLang would then take a target for hooked that is not.
    for one in RECORDS:
        if not plugin_hooks.in_place(one):
            HookRegistry._patched.discard(one.target)
            HookRegistry._hooks.pop(one.target, None)
    yield
    plugin_hooks.uninstall(RECORDS)
    assert not plugin_hooks.installed_names()


def test_there_are_records_for_every_process() -> None:
    assert {p.process for p in RECORDS} >= {Process.MAIN, Process.TOKENIZER, Process.SCHEDULER}
    assert {p.name for p in RECORDS} >= {"lora_memory_pool", "radix_cache", "scheduler", "cli_arguments"}


@BY_NAME
def test_target_is_as_it_was_read_and_the_hook_exists(patch: Patch) -> None:
    state = verify.check_target(patch)
    assert state.ok, state.problem
    assert state.hash_ok, state.problem


@BY_NAME
def test_applies_and_is_taken_back(patch: Patch) -> None:
    before = None if patch.kind is Kind.REGISTRY else patch.load_target()
    assert not plugin_hooks.in_place(patch)
    plugin_hooks.install([patch])
    HookRegistry.apply_hooks()
    assert plugin_hooks.in_place(patch)
    plugin_hooks.uninstall([patch])
    assert not plugin_hooks.in_place(patch)
    assert patch.target not in HookRegistry._patched
    if before is not None:
        # A bound classmethod is a new object each time; what it binds is not.
        after = patch.load_target()
        assert getattr(after, "__func__", after) is getattr(before, "__func__", before)


def test_a_class_that_replaced_another_is_itself_again_when_it_is_taken_back() -> None:
    from sglang.srt.lora import lora_manager, mem_pool

    from elora_sglang.integration.weights import pool as lora_pool

    stock, ours = mem_pool.LoRAMemoryPool, lora_pool.EloraLoRAMemoryPool
    assert stock is not ours and issubclass(ours, stock)
    plugin_hooks.install([record("lora_memory_pool")])
    HookRegistry.apply_hooks()
    assert lora_manager.LoRAMemoryPool is ours
    plugin_hooks.uninstall(RECORDS)
    assert lora_pool.EloraLoRAMemoryPool is ours
    assert lora_pool.LoRAMemoryPool is mem_pool.LoRAMemoryPool is lora_manager.LoRAMemoryPool is stock


def test_a_server_touches_few_places() -> None:
    assert len(serving(RECORDS)) <= 26


@BY_NAME
def test_another_sglang_is_refused_by_name(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "sglang_version", lambda: "0.6.0")
    with pytest.raises(SystemExit, match=patch.target.replace(".", r"\.")) as refused:
        verify.check_all([patch])
    assert "0.6.0" in str(refused.value.code)
    assert "\n" not in str(refused.value.code)


def record(name: str) -> Patch:
    return next(p for p in RECORDS if p.name == name)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("bind_pool", "sglang.srt.model_executor.model_runner.ModelRunner._init_post_memory_pool_components"),
        ("scheduler", "sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class"),
    ],
    ids=["a hook's target", "an overridden method"],
)
def test_a_changed_signature_refuses_and_a_changed_source_warns(
    name: str, target: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(target, lambda self: None)
    verify.check_all([record(name)])
    assert f"source of {target} differs" in caplog.text
    monkeypatch.setattr(target, lambda self, policy: None)
    with pytest.raises(SystemExit, match=rf"{target.rpartition('.')[2]} takes \(self"):
        verify.check_all([record(name)])


def test_a_method_that_is_gone_refuses_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.managers.scheduler import Scheduler

    monkeypatch.delattr(Scheduler, "can_schedule_lora_req")
    with pytest.raises(SystemExit, match=r"scheduler\.Scheduler\.can_schedule_lora_req is not in SGLang"):
        verify.check_all([record("scheduler")])


def test_a_hook_that_sglang_swallowed_refuses_and_names_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = record("scheduler")
    plugin_hooks.install([patch])

    def fail(target: str, hooks: list[Any]) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(HookRegistry, "_apply_target", fail)
    HookRegistry.apply_hooks()  # SGLang logs the planted fault and goes on
    with pytest.raises(SystemExit, match=r"scheduler\.Scheduler is not in place"):
        verify.require_in_place([patch])


def test_another_plugins_replacement_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = record("lora_memory_pool")
    plugin_hooks.install([patch])
    HookRegistry.apply_hooks()
    owner, name = plugin_hooks._owner(patch)
    with monkeypatch.context() as other:
        other.setattr(owner, name, type("TheirPool", (), {}))
        assert not plugin_hooks.in_place(patch)
        with pytest.raises(SystemExit, match=r"the target by .*\.TheirPool"):
            verify.require_in_place([patch])
    assert plugin_hooks.in_place(patch)


def test_two_plugins_that_replace_one_class_are_noticed() -> None:
    from sglang.srt.managers.scheduler import Scheduler

    class TheirScheduler(Scheduler):
        pass

    patch = record("scheduler")
    plugin_hooks.install([patch])
    HookRegistry.register(patch.target, TheirScheduler, HookType.REPLACE)
    try:
        HookRegistry.apply_hooks()  # the last one wins
        with pytest.raises(SystemExit, match=r"the target by .*\.TheirScheduler"):
            verify.require_in_place([patch])
    finally:
        plugin_hooks.uninstall([patch])
        HookRegistry._hooks.pop(patch.target, None)


@pytest.mark.parametrize(("kind", "kept"), [(HookType.AROUND, True), (HookType.REPLACE, False)])
def test_another_plugin_may_wrap_what_we_override_but_not_replace_it(kind: HookType, kept: bool) -> None:
    ours = record("scheduler").load_hook()
    target = f"{record('scheduler').target}.run_batch"
    before = vars(ours)["run_batch"]
    plugin_hooks.install([record("scheduler")])
    HookRegistry.register(target, lambda original, *args: original(*args), kind)
    try:
        HookRegistry.apply_hooks()
        assert vars(ours)["run_batch"] is not before
        assert plugin_hooks.in_place(record("scheduler")) is kept
    finally:
        ours.run_batch = before
        HookRegistry._hooks.pop(target, None)
        HookRegistry._patched.discard(target)


def test_every_override_is_a_method_that_sglang_has() -> None:
    """A member of our classes that SGLang does not know is a helper of ours, with a name of its own."""
    assert {"run_batch", "unload_lora_adapter"} <= set(overrides(record("scheduler").load_hook()))
    assert "_tick" not in overrides(record("scheduler").load_hook())
    mixed_in = set(overrides(record("tokenizer_manager").load_hook()))
    assert {"begin_weight_update", "load_lora_adapter", "_init_req_state"} <= mixed_in


def test_the_scheduler_refuses_without_its_hooks_only_with_elora() -> None:
    from elora_sglang.integration.plugin.config import EloraConfig

    verify.require_hooks(EloraConfig())
    with pytest.raises(SystemExit, match="is not in place"):
        verify.require_hooks(EloraConfig(enabled=True))


def test_the_table_is_current() -> None:
    assert table.main(["--check"]) == 0, "run python -m elora_sglang.patches.table --refresh"


def test_without_elora_only_the_command_line_is_touched() -> None:
    everywhere = select(RECORDS, process=set(Process), when={When.ALWAYS})
    assert {p.name for p in everywhere} == {
        "cli_arguments",
        "cli_config",
        "engine_arguments",
        "engine_schedulers",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "torch.nn.Linear"}, "not inside sglang"),
        ({"hook": "other.package.hook"}, "not inside elora_sglang"),
        ({"why": " "}, "`why` is empty"),
        ({"kind": Kind.REGISTRY}, "belong to kind REGISTRY"),
    ],
)
def test_a_malformed_record_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    values = {
        "name": "example",
        "target": "sglang.srt.x",
        "kind": Kind.AROUND,
        "hook": "elora_sglang.integration.x",
        "why": "an example",
        "upstream": "https://github.com/sgl-project/sglang",
        "remove_when": "never",
    }
    Patch(**values)
    with pytest.raises(ValueError, match=message):
        Patch(**{**values, **change})


def test_signatures_do_not_depend_on_annotations_or_default_values() -> None:
    def one(self: Any, a: int, *, b: str | None = None) -> None: ...
    def two(self, a, *, b=3): ...  # type: ignore[no-untyped-def]

    assert signature_of(one) == signature_of(two) == "(self, a, *, b=...)"
