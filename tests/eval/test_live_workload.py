"""Chat traffic, GPU profile, memory arithmetic and statistics of the live comparison."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from elora_sglang.eval.serving import chat, model, statistics, systems
from elora_sglang.eval.serving.drive import Record
from elora_sglang.eval.sim import machine

VOCAB = 1000
ADAPTER_TOKENS = 650.0


def traffic(seed: str = "1", working_set: int = 24_000) -> chat.Workload:
    return chat.generate(seed, working_set, ADAPTER_TOKENS, vocab=VOCAB)


def test_the_same_seed_gives_the_same_traffic_and_another_seed_another() -> None:
    assert traffic() == traffic()
    assert traffic() != traffic("2")


def test_a_conversation_grows_and_its_adapter_stays() -> None:
    for session in itertools.chain(*traffic().lanes):
        assert chat.TURNS[0] <= len(session.turns) <= chat.TURNS[1]
        assert 0 <= session.skip < len(session.turns)
        assert all(chat.FIRST_ID <= token < VOCAB for turn in session.turns for token in turn.user)
    openings = [s for lane in traffic().lanes for s in lane[1:]]
    assert all(s.skip == 0 for s in openings), "only what was alive at the start is in its middle"


def test_sessions_of_one_adapter_share_its_system_prompt() -> None:
    prompts: dict[int, set[tuple[int, ...]]] = {}
    for session in itertools.chain(*traffic().lanes):
        prompts.setdefault(session.adapter, set()).add(session.system)
    assert len(prompts) > 1
    assert all(len(found) == 1 for found in prompts.values())


@pytest.mark.parametrize("working_set", [16_000, 24_000, 64_000])
def test_live_sessions_and_adapters_fill_the_working_set(working_set: int) -> None:
    adapters, live = chat.size(working_set, ADAPTER_TOKENS)
    system = sum(chat.SYSTEM_TOKENS) / 2
    filled = adapters * (ADAPTER_TOKENS + system) + live * chat.mean_history()
    assert filled == pytest.approx(working_set, rel=0.03)
    assert adapters * ADAPTER_TOKENS == pytest.approx(working_set * chat.ADAPTER_SHARE, rel=0.1)


def test_a_session_in_its_middle_starts_with_its_history() -> None:
    session = next(lane[0] for lane in traffic().lanes if lane[0].skip > 1)
    opening = chat.opening(session, "1", VOCAB)
    before = session.turns[: session.skip]
    assert len(opening) == len(session.system) + sum(len(t.user) + t.answer_tokens for t in before)
    assert opening == chat.opening(session, "1", VOCAB)


def test_the_most_used_adapter_is_used_as_often_as_zipf_says() -> None:
    work = traffic(working_set=64_000)
    counts = [0] * work.adapters
    for session in itertools.chain(*work.lanes):
        counts[session.adapter] += 1
    expected = chat.zipf_weights(work.adapters)[0]
    assert max(counts) == counts[0]
    assert counts[0] / sum(counts) == pytest.approx(expected, rel=0.15)


def test_the_link_has_the_gpus_proportions() -> None:
    gpu = machine.load("h200-llama-8b")
    assert gpu.link_to_compute == pytest.approx(2.383 / 32.4, rel=0.01)  # us to move and to prefill one token
    here = gpu.link_for(6144, 0.4e-3)
    assert 6144 / (here * 1e9) / 0.4e-3 == pytest.approx(gpu.link_to_compute)
    with pytest.raises(ValueError, match="above 0"):
        gpu.link_for(6144, 0.0)


def budget() -> systems.Budget:
    return systems.Budget(device_tokens=16_384, host_tokens=49_152, running=8, adapters=12)


def flag(system: systems.System, name: str) -> str:
    return system.flags[system.flags.index(name) + 1]


@pytest.mark.parametrize("name", ["stock", "stock-overlap", "hicache"])
@pytest.mark.parametrize("slots", [4, 8])
def test_slot_buffers_count_as_device_memory(name: str, slots: int) -> None:
    system = systems.make(name, slots, budget(), Path("m"), 0.1)
    kv = int(flag(system, "--max-total-tokens")) * model.KV_BYTES_PER_TOKEN
    total = kv + slots * budget().slot_bytes
    assert total <= budget().device_tokens * model.KV_BYTES_PER_TOKEN < total + model.KV_BYTES_PER_TOKEN
    assert system.env == {"ELORA_EVAL_LINK_GBPS": "0.100000"}


def test_host_memory_is_the_same_with_sglangs_copies_of_adapters() -> None:
    hicache = systems.make("hicache", 4, budget(), Path("m"), 0.1)
    kv = float(flag(hicache, "--hicache-ratio")) * int(flag(hicache, "--max-total-tokens"))
    total = kv * model.KV_BYTES_PER_TOKEN + budget().adapters_bytes
    allowed = budget().host_tokens * model.KV_BYTES_PER_TOKEN
    assert total == pytest.approx(allowed, rel=1e-3)
    elora = systems.make("elora", None, budget(), Path("m"), 0.1)
    assert float(flag(elora, "--elora-host-memory").removesuffix("GB")) * 1e9 == pytest.approx(allowed)
    assert flag(elora, "--max-total-tokens") == str(budget().device_tokens)


def test_overlapped_loading_keeps_two_adapters_a_slot_and_registers_the_rest_later() -> None:
    system = systems.make("stock-overlap", 4, budget(), Path("m"), 0.1)
    assert flag(system, "--max-loaded-loras") == "8"
    assert len(system.late_adapters) == 4


def test_the_sweep_gives_adapters_shares_of_the_memory_whatever_their_rank() -> None:
    assert systems.sweep("stock", budget(), quick=False) == (2, 3, 5)  # of 64: 1,720 tokens a slot
    equal = systems.Budget(16_384, 49_152, 8, 12, ranks=(32,))
    assert systems.sweep("hicache", equal, quick=False) == (4, 7, 10)
    assert systems.sweep("static", equal, quick=False) == systems.SHARES
    assert systems.sweep("elora", equal, quick=False) == ()


def test_slots_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ValueError, match="--device-tokens"):
        systems.make("stock", 18, budget(), Path("m"), 0.1)


def info(**baseline: object) -> dict:
    report = {
        "hooks": [f"baseline_{hook}" for hook in systems.BASELINE_HOOKS],
        "link_gbps": 0.1,
        "slot_buffer_bytes": 4 * budget().slot_bytes,
    }
    return {"internal_states": [{"baseline": report | baseline}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hooks": ["baseline_report"]}, "hooks not in place: baseline_adapter_copy"),
        ({"link_gbps": 0.2}, "its link has 0.2"),
        ({"slot_buffer_bytes": 1}, "slot buffers hold 1 bytes"),
    ],
)
def test_a_baseline_without_its_hooks_is_refused(change: dict, message: str) -> None:
    system = systems.make("stock", 4, budget(), Path("m"), 0.1)
    systems.require_hooks(system, info(), budget(), 0.1)
    with pytest.raises(RuntimeError, match=message):
        systems.require_hooks(system, info(**change), budget(), 0.1)
    with pytest.raises(RuntimeError, match="no baseline hooks"):
        systems.require_hooks(system, {"internal_states": [{}]}, budget(), 0.1)


def record(key: str, ttft: float, prompt: int = 100, cached: int = 0, host: int = 0) -> Record:
    return Record(key, 1.0, ttft, 0.02, prompt, cached, host, (1, 2))


def test_summary_and_quantiles() -> None:
    found = statistics.summary([record(f"0/0/{i}", i / 100) for i in range(1, 101)], 50.0)
    assert found["ttft_p50"] == 0.50
    assert found["ttft_p95"] == 0.95
    assert found["ttft_p99"] == 0.99
    assert found["rate"] == 2.0
    tiers = statistics.summary([record("0/0/0", 1.0, cached=60, host=40), record("0/0/1", 1.0)], 1.0)
    assert tiers["hit_device"] == pytest.approx(0.1)
    assert tiers["hit_host"] == pytest.approx(0.2)


def test_a_paired_ratio_ignores_what_both_repeats_share() -> None:
    mean, low, high = statistics.ratio([0.5, 1.0, 2.0], [1.0, 2.0, 4.0])
    assert (mean, low, high) == pytest.approx((0.5, 0.5, 0.5))
    assert statistics.ratio([1.0], [2.0])[2] == math.inf


def test_only_the_first_different_answer_of_a_session_counts() -> None:
    ours = {"0/0/0": [1], "0/0/1": [2], "0/0/2": [3], "1/0/0": [4]}
    theirs = {"0/0/0": [1], "0/0/1": [9], "0/0/2": [9], "1/0/0": [4]}
    assert statistics.differing(ours, theirs) == (1, 3, ["0/0/1"])


def test_elora_without_its_link_is_refused() -> None:
    system = systems.make("elora", None, budget(), Path("m"), 0.1)
    systems.require_hooks(system, {"internal_states": [{"elora": {"link_gbps": 0.1}}]}, budget(), 0.1)
    for state in ({}, {"elora": {}}, {"elora": {"link_gbps": 0.0}}):
        with pytest.raises(RuntimeError, match="elora: "):
            systems.require_hooks(system, {"internal_states": [state]}, budget(), 0.1)
