"""Every patch record: it applies, its hook is reached, taking it back restores, another SGLang is refused."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import sglang.srt.managers.scheduler  # noqa: F401  SGLang's modules import each other; this order works
from sglang.srt.plugins.hook_registry import HookRegistry

from elora_sglang.integration.plugin import install as plugin_hooks
from elora_sglang.integration.plugin import verify
from elora_sglang.patches import table
from elora_sglang.patches.base import Kind, Patch, Process, When, discover, select, signature_of

RECORDS = discover()
BY_NAME = pytest.mark.parametrize("patch", RECORDS, ids=lambda p: p.name)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    # Another test of this process may have loaded SGLang's plugins and put the targets back by other means:
    # SGLang would then take a target for hooked that is not.
    for record in RECORDS:
        if not plugin_hooks.in_place(record):
            HookRegistry._patched.discard(record.target)
            HookRegistry._hooks.pop(record.target, None)
    yield
    plugin_hooks.uninstall(RECORDS)
    assert not plugin_hooks.installed_names()


def test_there_are_records_for_every_process() -> None:
    assert {p.process for p in RECORDS} >= {Process.MAIN, Process.TOKENIZER, Process.SCHEDULER}
    assert {p.name for p in RECORDS} >= {"lora_memory_pool", "radix_cache", "prefill_adder", "cli_arguments"}


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
    plugin_hooks.install([next(p for p in RECORDS if p.name == "lora_memory_pool")])
    HookRegistry.apply_hooks()
    assert lora_manager.LoRAMemoryPool is ours
    plugin_hooks.uninstall(RECORDS)
    assert lora_pool.EloraLoRAMemoryPool is ours
    assert lora_pool.LoRAMemoryPool is mem_pool.LoRAMemoryPool is lora_manager.LoRAMemoryPool is stock


@BY_NAME
def test_hook_is_reached(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SGLang calls at the target ends in the record's hook (a stand-in that writes down the call)."""
    calls: list[tuple[Any, ...]] = []

    class Replacement:
        def __init__(self, *args: Any) -> None:
            calls.append(args)

    def hook(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return args[0](*args[1:]) if patch.kind is Kind.AROUND else None

    stand_in = Replacement if inspect.isclass(patch.load_hook()) and patch.kind is Kind.REPLACE else hook
    if patch.kind is Kind.REGISTRY:
        plugin_hooks.install([patch])
        entry = pkgutil.resolve_name(str(patch.registry))[patch.key]
        assert patch.load_hook() in (entry if isinstance(entry, list) else [entry])
        return
    monkeypatch.setattr(Patch, "load_hook", lambda self: stand_in)
    owner, name = plugin_hooks._owner(patch)
    if patch.kind is not Kind.REPLACE:
        raw = vars(owner).get(name)
        original = lambda *args: "original"  # noqa: E731  needs no arguments that mean anything
        wrapper = type(raw) if isinstance(raw, (classmethod, staticmethod)) else (lambda f: f)
        monkeypatch.setattr(owner, name, wrapper(original))
    plugin_hooks.install([patch])
    HookRegistry.apply_hooks()
    result = getattr(owner, name)("argument")
    assert len(calls) == 1
    assert "argument" in calls[0]
    if patch.kind is not Kind.REPLACE:
        assert result == "original"
    plugin_hooks.uninstall([patch])


@BY_NAME
def test_another_sglang_is_refused_by_name(patch: Patch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "sglang_version", lambda: "0.6.0")
    with pytest.raises(SystemExit, match=patch.target.replace(".", r"\.")) as refused:
        verify.check_all([patch])
    assert "0.6.0" in str(refused.value.code)
    assert "\n" not in str(refused.value.code)


def test_a_changed_signature_refuses_and_a_changed_source_warns(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    patch = next(p for p in RECORDS if p.name == "prefill_adder")
    owner, name = plugin_hooks._owner(patch)
    monkeypatch.setattr(owner, name, lambda self: None)
    verify.check_all([patch])
    assert "source of sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class differs" in caplog.text
    monkeypatch.setattr(owner, name, lambda self, policy: None)
    with pytest.raises(SystemExit, match=r"get_prefill_adder_class takes \(self, policy\)"):
        verify.check_all([patch])


def test_a_hook_that_sglang_swallowed_refuses_and_names_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = next(p for p in RECORDS if p.name == "prefill_adder")
    plugin_hooks.install([patch])

    def fail(target: str, hooks: list[Any]) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(HookRegistry, "_apply_target", fail)
    HookRegistry.apply_hooks()  # SGLang logs the planted fault and goes on
    with pytest.raises(SystemExit, match=r"Scheduler\.get_prefill_adder_class is not in place"):
        verify.require_in_place([patch])


def test_another_plugins_replacement_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = next(p for p in RECORDS if p.name == "lora_memory_pool")
    plugin_hooks.install([patch])
    HookRegistry.apply_hooks()
    owner, name = plugin_hooks._owner(patch)
    with monkeypatch.context() as other:
        other.setattr(owner, name, type("TheirPool", (), {}))
        assert not plugin_hooks.in_place(patch)
    assert plugin_hooks.in_place(patch)


def test_the_scheduler_refuses_without_its_hooks_only_with_elora() -> None:
    from elora_sglang.integration.plugin.config import EloraConfig

    verify.require_hooks(EloraConfig())
    with pytest.raises(SystemExit, match="is not in place"):
        verify.require_hooks(EloraConfig(enabled=True))


def test_the_table_is_current() -> None:
    assert table.main(["--check"]) == 0, "run python -m elora_sglang.patches.table --refresh"


def test_without_elora_only_the_command_line_is_touched() -> None:
    everywhere = select(RECORDS, process=set(Process), when={When.ALWAYS})
    assert {p.name for p in everywhere} == {"cli_arguments", "cli_config"}


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
    record = {
        "name": "example",
        "target": "sglang.srt.x",
        "kind": Kind.AROUND,
        "hook": "elora_sglang.integration.x",
        "why": "an example",
        "upstream": "https://github.com/sgl-project/sglang",
        "remove_when": "never",
    }
    Patch(**record)
    with pytest.raises(ValueError, match=message):
        Patch(**{**record, **change})


def test_signatures_do_not_depend_on_annotations_or_default_values() -> None:
    def one(self: Any, a: int, *, b: str | None = None) -> None: ...
    def two(self, a, *, b=3): ...  # type: ignore[no-untyped-def]

    assert signature_of(one) == signature_of(two) == "(self, a, *, b=...)"
