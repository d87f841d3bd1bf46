"""The command line and the table of LoRA flags: every field has a row, and behaves as the row says."""

from __future__ import annotations

import argparse
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.arg_groups.fields.lora import Lora
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.server_args import ServerArgs

from elora_sglang.integration.plugin import config, flags, flags_lora
from elora_sglang.integration.plugin import launch as engine
from elora_sglang.integration.plugin.config import EloraConfig
from elora_sglang.integration.plugin.flags_lora import LORA_FLAGS, Verdict
from elora_sglang.integration.plugin.install import install, uninstall
from elora_sglang.integration.plugin.verify import Refused
from elora_sglang.patches.base import Process, When, discover, select
from elora_sglang.runtime.pool import host_size

ROWS = {row.field: row for row in LORA_FLAGS}

#: A value that a user might give, for every field with which something happens to it.
GIVEN: dict[str, Any] = {
    "enable_lora": True,
    "enable_lora_overlap_loading": True,
    "max_lora_rank": 7,
    "lora_target_modules": ["q_proj", "o_proj"],
    "lora_paths": ["sql=/adapters/sql"],
    "max_loaded_loras": 3,
    "max_loras_per_batch": 5,
    "lora_eviction_policy": "fifo",
    "lora_backend": "triton",
    "max_lora_chunk_size": 64,
    "experts_shared_outer_loras": True,
    "lora_use_virtual_experts": True,
    "lora_strict_loading": True,
    "lora_drain_wait_threshold": 1.5,
}


@pytest.fixture(autouse=True)
def stock_afterwards(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv(config.ENV_ENABLED, "0")
    yield
    uninstall(discover())


def resolved(**given: Any) -> tuple[ServerArgs, Any]:
    """ServerArgs after the step in which --elora speaks, without the steps that read a model."""
    server_args = engine.apply_settings(ServerArgs(model_path="model", **given), EloraConfig(enabled=True))
    engine.imply_settings(server_args, lambda args: None)
    return server_args, resolving_view(server_args)


def parse(*arguments: str) -> ServerArgs:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    flags.add_cli_args(None, parser)
    given = parser.parse_args(["--model-path", "model", *arguments])
    return flags.from_cli_args(ServerArgs.from_cli_args(given), ServerArgs, given)


def test_every_lora_field_of_sglang_has_exactly_one_row() -> None:
    assert sorted(row.field for row in LORA_FLAGS) == sorted(Lora.__struct_fields__)


@pytest.mark.parametrize("field", sorted(Lora.__struct_fields__))
def test_a_given_value_does_what_its_row_says(field: str, caplog: pytest.LogCaptureFixture) -> None:
    row, given = ROWS[field], GIVEN[field]
    if row.verdict is Verdict.REFUSED:
        with pytest.raises(Refused, match=row.flag):
            resolved(**{field: given})
        return
    _, args = resolved(**{field: given})
    warned = [line for line in caplog.messages if line.startswith(f"elora: {row.flag} is ignored")]
    if row.verdict is Verdict.IGNORED:
        assert len(warned) == 1
        assert getattr(args, field) != given
    else:
        assert not warned
        value = getattr(args, field)
        assert (sorted(value) if isinstance(value, set) else value) == (
            sorted(given) if isinstance(value, set) else given
        )


def test_nothing_given_nothing_warned(caplog: pytest.LogCaptureFixture) -> None:
    resolved()
    assert not [line for line in caplog.messages if "ignored" in line]


def test_elora_alone_is_enough() -> None:
    _, args = resolved()
    assert args.enable_lora is True
    assert args.lora_backend == args.radix_cache_backend == "elora"
    assert args.lora_target_modules == {"all"}
    assert args.max_lora_rank == flags_lora.ANY_LORA_RANK


def test_adapters_per_batch_follow_the_limit_on_running_requests() -> None:
    assert resolved(max_running_requests=24)[1].max_loras_per_batch == 25
    assert resolved()[1].max_loras_per_batch == flags_lora.MOST_RUNNING_REQUESTS + 1


def test_a_platform_that_sets_the_running_limit_later_is_followed() -> None:
    server_args, args = resolved()
    declare_resolution(server_args, "platform", max_running_requests=6)
    engine._follow_running_requests(server_args, args)
    assert args.max_loras_per_batch == 7


def test_decode_cuda_graphs_stay_on_where_there_is_cuda() -> None:
    on_cuda = resolved(device="cuda")[1]
    assert not on_cuda.disable_cuda_graph and on_cuda.disable_prefill_cuda_graph
    assert not on_cuda.disable_decode_cuda_graph
    assert resolved(device="cpu")[1].disable_cuda_graph


def test_stocks_own_lora_checks_accept_what_elora_implies() -> None:
    from sglang.srt.arg_groups.lora_hook import check_lora_server_args

    server_args, args = resolved(max_loaded_loras=2)
    check_lora_server_args(server_args)
    assert args.lora_paths == []


def test_without_the_flag_the_arguments_are_stock() -> None:
    server_args = parse()
    assert config.current(server_args) == EloraConfig()
    engine.imply_settings(server_args, lambda args: None)
    assert not getattr(server_args, "_resolved_overrides", None)


def test_the_command_line_reaches_a_child_process() -> None:
    server_args = parse("--elora", "--elora-policy", "lru", "--elora-adapter-names", "stock")
    expected = EloraConfig(enabled=True, policy="lru", adapter_names="stock")
    assert config.current(server_args) == expected
    assert config.current(pickle.loads(pickle.dumps(server_args))) == expected
    assert config.launcher_enabled()


def test_a_config_file_may_say_elora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.server_args import prepare_server_args

    file = tmp_path / "server.yaml"
    file.write_text("model-path: model\nelora: true\nelora-adapter-names: stock\n")
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)  # it would take pytest's handlers away
    install(select(discover(), process={Process.MAIN}, when={When.ALWAYS}))
    HookRegistry.apply_hooks()
    server_args = prepare_server_args(["--config", str(file)])
    assert config.current(server_args) == EloraConfig(enabled=True, adapter_names="stock")


def test_the_backend_can_be_named_but_not_without_elora() -> None:
    assert config.current(parse("--elora", "--lora-backend", "elora")).enabled
    with pytest.raises(Refused, match="--lora-backend elora needs --elora"):
        parse("--lora-backend", "elora")


def test_a_setting_without_elora_is_an_error() -> None:
    with pytest.raises(Refused, match="--elora-adapter-names has no effect without --elora"):
        parse("--elora-adapter-names", "stock")


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"elora": True, "elora_polcy": "lru"}, "unknown ELORA setting 'elora_polcy'; known are elora"),
        (
            {"elora": True, "elora_policy": "fifo"},
            "--elora-policy: 'fifo' is not one of arc, chameleon, elora",
        ),
        ({"elora": True, "elora_adapter_names": "loose"}, "'loose' is not one of strict, stock"),
        ({"elora": "yes"}, "--elora: expected bool, got 'yes'"),
    ],
)
def test_a_bad_keyword_is_one_clear_line(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.from_keywords(keywords)


def test_all_means_the_linear_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang.srt.lora.utils as utils

    found = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"}
    monkeypatch.setattr(utils, "auto_detect_lora_target_modules", lambda model: set(found))
    for unspecific in ({"all"}, None, set()):
        assert flags_lora.linear_modules(None, unspecific) == found - {"embed_tokens", "lm_head"}
    assert flags_lora.linear_modules(None, {"q_proj"}) == {"q_proj"}


def test_the_page_is_current() -> None:
    assert flags.main(["--check"]) == 0, "run python -m elora_sglang.integration.plugin.flags --write"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"elora_host_memory": "lots"}, "--elora-host-memory: 'lots' is not auto, a number of gigabytes"),
        ({"elora_host_memory": "-1"}, "--elora-host-memory: '-1' is not auto"),
        ({"elora_busy_watermark": 1.5}, "--elora-busy-watermark: 1.5 must be above 0 and at most 1"),
        ({"elora_idle_watermark": -0.1}, "--elora-idle-watermark: -0.1 must be between 0 and 1"),
        (
            {"elora_busy_watermark": 0.5},
            "--elora-idle-watermark: 0.7 must not be above --elora-busy-watermark",
        ),
        ({"elora_swap_interval": 0.0}, "--elora-swap-interval: 0.0 must be a positive number of seconds"),
        ({"elora_swap_interval": float("nan")}, "--elora-swap-interval: nan must be a positive number"),
        ({"elora_lora_share": 1}, "--elora-lora-share: 1.0 must be above 0 and below 1"),
        ({"elora_link_gbps": -2}, "--elora-link-gbps: -2.0 must be 0 or a positive number"),
        ({"elora_without": "guard,treee"}, "--elora-without: 'treee' is not one of dependency, unified"),
        ({"elora_trace_out": "/no/such/folder/t.jsonl"}, "--elora-trace-out: the folder of '/no/such/folder"),
        ({"elora_audit_interval": -1}, "--elora-audit-interval: -1 must not be negative"),
    ],
)
def test_swapper_settings_are_checked_with_one_line(given: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as caught:
        config.from_keywords({"elora": True, **given})
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_settings_in_their_spellings() -> None:
    given = ("--elora", "--elora-without", "guard, queue-prefetch", "--elora-link-gbps", "2")
    settings = config.current(parse(*given))
    assert settings.without_terms == {"guard", "queue-prefetch"}
    assert settings.link_gbps == 2.0
    assert config.from_keywords({"elora": True, "elora_link_gbps": 3}).link_gbps == 3.0
    assert config.from_keywords({"elora": True}).without_terms == frozenset()


def test_a_policy_may_be_written_with_dashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "policy_names", lambda: ("lru", "paper_literal"))
    for name in ("paper-literal", "paper_literal"):
        assert config.current(parse("--elora", "--elora-policy", name)).policy == "paper_literal"
        assert config.from_keywords({"elora": True, "elora_policy": name}).policy == "paper_literal"


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("0", 0),
        ("0GB", 0),
        ("0x", 0),
        ("auto", 400),  # as much as the device pool
        ("0.5x", 192),
        ("2x", 800),
        ("1.3x", 512),  # whole pages
        ("0.0002", 96),  # 200,000 bytes over two ranks, 1,000 a slot: 100, of which whole pages
        ("0.0002 gb", 96),
    ],
)
def test_host_memory_becomes_slots(text: str, slots: int) -> None:
    found = host_size.host_slots(
        text, device_slots=400, slot_bytes=1000, page_size=16, ranks=2, available_bytes=10_000_000
    )
    assert found == slots


def test_automatic_host_memory_leaves_half_of_what_is_available() -> None:
    room = {"device_slots": 1000, "slot_bytes": 1000, "page_size": 1, "ranks": 2}
    assert host_size.host_slots("auto", available_bytes=1_000_000, **room) == 250
    with pytest.raises(ValueError, match=r"--elora-host-memory 1x is 0\.0 GB, and 0\.0 GB are available"):
        host_size.host_slots("1x", available_bytes=1_000_000, **room)
    assert 0 < host_size.available_bytes() < 1 << 50
