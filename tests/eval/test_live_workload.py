"""Chat traffic, machine profile and memory arithmetic of the live comparison."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from elora_sglang.eval.serving import chat, launch, player
from elora_sglang.eval.serving import evaluation_model as model
from elora_sglang.eval.serving.rig import counters_of
from elora_sglang.eval.sim import machine
from elora_sglang.eval.workloads.model import Piece, fault, prompts

ADAPTER_TOKENS = 650.0


def traffic(seed: str = "1", working_set: int = 24_000) -> player.Lanes:
    return chat.generate(seed, working_set, ADAPTER_TOKENS)


def test_the_same_seed_gives_the_same_traffic_and_another_seed_another() -> None:
    assert traffic() == traffic()
    assert traffic() != traffic("2")
    ids = [
        {turn.answer.id for session in lane for turn in session.turns} for lane in (*traffic(), *traffic("2"))
    ]
    assert sum(map(len, ids)) == len(set().union(*ids)), "seeds and lanes share no content of their own"


def test_a_conversation_grows_and_its_adapter_stays() -> None:
    for lane in traffic():
        for number, session in enumerate(lane):
            assert fault(session, 100) is None
            assert (1 if number == 0 else chat.TURNS[0]) <= len(session.turns) <= chat.TURNS[1]
            said = [prompt for prompt, _ in prompts(session)]
            for turn, (before, after) in enumerate(itertools.pairwise(said)):
                assert after[: len(before) + 1] == (*before, session.turns[turn].answer)
            assert 0 <= session.start < 1, "a share, not seconds"


def test_sessions_of_one_adapter_share_its_system_prompt() -> None:
    found: dict[int | None, set[Piece]] = {}
    for session in itertools.chain(*traffic()):
        found.setdefault(session.adapter, set()).add(session.turns[0].new[0])
    assert len(found) > 1
    assert all(len(systems) == 1 for systems in found.values())
    assert len(set.union(*found.values())) == len(found)


@pytest.mark.parametrize("working_set", [16_000, 24_000, 64_000])
def test_live_sessions_and_adapters_fill_the_working_set(working_set: int) -> None:
    adapters, live = chat.size(working_set, ADAPTER_TOKENS)
    system = sum(chat.SYSTEM_TOKENS) / 2
    filled = adapters * (ADAPTER_TOKENS + system) + live * chat.mean_history()
    assert filled == pytest.approx(working_set, rel=0.03)
    assert adapters * ADAPTER_TOKENS == pytest.approx(working_set * chat.ADAPTER_SHARE, rel=0.1)


def test_only_what_was_alive_at_the_start_is_in_its_middle() -> None:
    pieces = [[len(session.turns[0].new) for session in lane] for lane in traffic()]
    assert all(first % 2 == 0 and set(others) == {2} for first, *others in pieces), (
        "system, user, answer, user"
    )
    assert max(first for first, *_ in pieces) > 2


def test_the_most_used_adapter_is_used_as_often_as_zipf_says() -> None:
    adapters, _ = chat.size(64_000, ADAPTER_TOKENS)
    counts = Counter(session.adapter for session in itertools.chain(*traffic(working_set=64_000)))
    weights = [1 / (rank + 1) ** chat.ZIPF for rank in range(adapters)]
    assert max(counts.values()) == counts[0]
    assert counts[0] / counts.total() == pytest.approx(weights[0] / sum(weights), rel=0.15)


def test_the_link_has_the_gpus_proportions() -> None:
    gpu = machine.load("h200-llama-8b")
    assert gpu.link_to_compute == pytest.approx(2.383 / 32.4, rel=0.01)  # us to move and to prefill one token
    here = gpu.link_for(6144, 0.4e-3)
    assert 6144 / (here * 1e9) / 0.4e-3 == pytest.approx(gpu.link_to_compute)
    with pytest.raises(ValueError, match="above 0"):
        gpu.link_for(6144, 0.0)


def budget() -> launch.Budget:
    return launch.Budget(device_tokens=16_384, host_tokens=49_152, running=8, adapters=12)


def flag(system: launch.System, name: str) -> str:
    return system.flags[system.flags.index(name) + 1]


@pytest.mark.parametrize("name", ["stock", "stock-overlap", "hicache"])
@pytest.mark.parametrize("slots", [4, 8])
def test_slot_buffers_count_as_device_memory(name: str, slots: int) -> None:
    system = launch.system(name, slots, budget(), Path("m"), 0.1)
    kv = int(flag(system, "--max-total-tokens")) * model.KV_BYTES_PER_TOKEN
    total = kv + slots * budget().slot_bytes
    assert total <= budget().device_tokens * model.KV_BYTES_PER_TOKEN < total + model.KV_BYTES_PER_TOKEN
    assert system.env == {"ELORA_EVAL_LINK_GBPS": "0.100000"}


def test_host_memory_is_the_same_with_sglangs_copies_of_adapters() -> None:
    hicache = launch.system("hicache", 4, budget(), Path("m"), 0.1)
    kv = float(flag(hicache, "--hicache-ratio")) * int(flag(hicache, "--max-total-tokens"))
    total = kv * model.KV_BYTES_PER_TOKEN + budget().adapters_bytes
    allowed = budget().host_tokens * model.KV_BYTES_PER_TOKEN
    assert total == pytest.approx(allowed, rel=1e-3)
    elora = launch.system("elora", None, budget(), Path("m"), 0.1)
    assert float(flag(elora, "--elora-host-memory").removesuffix("GB")) * 1e9 == pytest.approx(allowed)
    assert flag(elora, "--max-total-tokens") == str(budget().device_tokens)


def test_overlapped_loading_keeps_two_adapters_a_slot_and_registers_the_rest_later() -> None:
    system = launch.system("stock-overlap", 4, budget(), Path("m"), 0.1)
    assert flag(system, "--max-loaded-loras") == "8"
    assert len(system.late_adapters) == 4


def test_the_sweep_gives_adapters_shares_of_the_memory_whatever_their_rank() -> None:
    assert launch.candidates("stock", budget(), quick=False) == (2, 3, 5)  # of 64: 1,720 tokens a slot
    equal = launch.Budget(16_384, 49_152, 8, 12, ranks=(32,))
    assert launch.candidates("hicache", equal, quick=False) == (4, 7, 10)
    assert launch.candidates("static", equal, quick=False) == launch.SHARES
    assert launch.candidates("elora", equal, quick=False) == ()


def test_slots_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ValueError, match="--device-tokens"):
        launch.system("stock", 18, budget(), Path("m"), 0.1)


def info(**baseline: object) -> dict:
    report = {
        "hooks": [patch.name for patch in launch.PATCHES],
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
    system = launch.system("stock", 4, budget(), Path("m"), 0.1)
    launch.require_hooks(system, info(), budget(), 0.1)
    with pytest.raises(RuntimeError, match=message):
        launch.require_hooks(system, info(**change), budget(), 0.1)
    with pytest.raises(RuntimeError, match="no baseline hooks"):
        launch.require_hooks(system, {"internal_states": [{}]}, budget(), 0.1)


def test_elora_without_its_link_is_refused() -> None:
    system = launch.system("elora", None, budget(), Path("m"), 0.1)
    launch.require_hooks(system, {"internal_states": [{"elora": {"link_gbps": 0.1}}]}, budget(), 0.1)
    for state in ({}, {"elora": {}}, {"elora": {"link_gbps": 0.0}}):
        with pytest.raises(RuntimeError, match="elora: "):
            launch.require_hooks(system, {"internal_states": [state]}, budget(), 0.1)


def test_counters_are_all_numbers_that_the_server_reports() -> None:
    baseline = {"moved_bytes": {"load": 5, "save": 7}, "adapter_loads": 3, "hooks": ["x"], "link_gbps": 0.1}
    found = counters_of({"internal_states": [{"baseline": baseline}]})
    assert found == {"moved_load": 5, "moved_save": 7, "adapter_loads": 3}
    elora = {"loaded_bytes": 9, "ready": True, "policy": "lru", "deep": {"hits": 2}}
    assert counters_of({"internal_states": [{"elora": elora}]}) == {
        "elora.loaded_bytes": 9,
        "elora.deep.hits": 2,
    }
    assert counters_of({"internal_states": [{}]}) == {}
