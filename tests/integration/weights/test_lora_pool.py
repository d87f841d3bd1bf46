"""EloraLoRAMemoryPool: adapters through SGLang's layers into pool slots, per dtype, page size, shard."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.lora.lora_config import LoRAConfig
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from support.layout_bytes import payload_bytes
from support.lora_world import (
    MODULES,
    Shape,
    World,
    contiguous_slots,
    make_world,
    random_adapter,
    scattered_slots,
    tp_shard,
)

from elora_sglang.integration.weights import pool as memory_pool
from elora_sglang.integration.weights.peft import FUSED, lora_scaling
from elora_sglang.integration.weights.pool import EloraLoRAMemoryPool
from elora_sglang.runtime.adapters.files import AdapterError
from elora_sglang.runtime.pool.layout import CUT_WORTH

SHAPE = Shape()
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "all linear": ALL_LINEAR,
    "q and v": ["q_proj", "v_proj"],
    "k only": ["k_proj"],
    "q and o": ["q_proj", "o_proj"],
    "up only": ["up_proj"],
    "gate and down": ["gate_proj", "down_proj"],
}


def place(world: World, lora_id: str, order: str, seed: int = 0) -> torch.Tensor:
    """Load an adapter into consecutive or scattered slots; returns them."""
    count, page = world.pool.slots_needed(lora_id), world.pool.pool.page_size
    if order == "contiguous":
        slots = contiguous_slots(count, page, first_page=3 + seed)
    else:
        slots = scattered_slots(count, 4096, page, seed)
    world.pool.load(lora_id, slots)
    return slots


def shard_by_hand(shape: Shape, module: str, a: torch.Tensor, b: torch.Tensor, tp: tuple[int, int]) -> Any:
    """One tp rank's A and B of an unfused module, written out independently of SGLang's code."""
    tp_rank, tp_size = tp
    if module in ("o_proj", "down_proj"):  # row parallel: the input is cut
        width = a.shape[1] // tp_size
        return a[:, tp_rank * width : (tp_rank + 1) * width], b
    if module in ("k_proj", "v_proj") and tp_size > shape.kv_heads:  # a KV head is shared by several ranks
        head = tp_rank // (tp_size // shape.kv_heads)
        return a, b[head * shape.head_dim : (head + 1) * shape.head_dim]
    width = b.shape[0] // tp_size
    return a, b[tp_rank * width : (tp_rank + 1) * width]


def bytes_by_hand(
    world: World, tensors: dict[str, torch.Tensor], dtype: torch.dtype, tp: tuple[int, int]
) -> torch.Tensor:
    """What the pool must hold: layer by layer, modules by name, stacked A, then each part's B transposed."""
    groups = {
        "down_proj": ["down_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
        "o_proj": ["o_proj"],
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    }
    found: list[torch.Tensor] = []
    for layer in range(world.shape.layers):
        for parts in groups.values():
            stacked, outputs = [], []
            for part in parts:
                names = [name for name in tensors if f"layers.{layer}." in name and f".{part}." in name]
                if names:
                    a, b = (next(tensors[n] for n in names if f"lora_{side}" in n) for side in "AB")
                    a, b = shard_by_hand(world.shape, part, a, b, tp)
                    stacked.append(a)
                    outputs.append(b.t())
            if stacked:
                found += [torch.cat(stacked), *outputs]
    return torch.cat([m.to(dtype).contiguous().view(torch.uint8).flatten() for m in found])


@pytest.mark.parametrize("order", ["contiguous", "scattered"])
@pytest.mark.parametrize("tp", [(0, 1), (0, 2), (1, 2), (3, 4)], ids="tp{0[0]}of{0[1]}".format)
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float8_e4m3fn),
        (torch.bfloat16, torch.float8_e5m2),
    ],
    ids=str,
)
def test_bytes_round_trip(
    dtype: torch.dtype, kv_dtype: torch.dtype, page_size: int, tp: tuple[int, int], order: str
) -> None:
    world = make_world(dtype=dtype, kv_dtype=kv_dtype, page_size=page_size, tp=tp)
    for number, (lora_id, modules) in enumerate(TARGETS.items()):
        file_dtype = [torch.float32, torch.float16, torch.bfloat16][number % 3]
        config, tensors = random_adapter(
            SHAPE, modules, [1, 4, 12][number % 3], seed=number, dtype=file_dtype
        )
        world.add(lora_id, config, tensors)
        with tp_shard(*tp):
            slots = place(world, lora_id, order, seed=number)
            assert slots.numel() % page_size == 0
            expected = bytes_by_hand(world, tensors, dtype, tp)
            assert torch.equal(world.pool.read_bytes(lora_id), expected)
            assert torch.equal(world.pool.expected_bytes(lora_id), expected)
        assert torch.equal(world.pool.resident[lora_id], slots.sort().values)
        world.pool.drop(lora_id)


@pytest.mark.parametrize("tp_size", [2, 4])
def test_all_tp_ranks_need_the_same_slots(tp_size: int) -> None:
    needed = []
    for tp_rank in range(tp_size):
        world = make_world(tp=(tp_rank, tp_size), page_size=16)
        for lora_id, modules in TARGETS.items():
            world.add(lora_id, *random_adapter(SHAPE, modules, 12, seed=1))
        needed.append([world.pool.slots_needed(lora_id) for lora_id in TARGETS])
    assert all(row == needed[0] for row in needed), needed


def test_swapped_pages_are_noticed() -> None:
    """Negative control of the byte comparison (the auditor's): two pages of the adapter trade places."""
    world = make_world(page_size=16)
    world.add("a", *random_adapter(SHAPE, ALL_LINEAR, 8, seed=1))
    slots = place(world, "a", "contiguous")
    assert torch.equal(world.pool.read_bytes("a"), world.pool.expected_bytes("a"))
    for buffer in (world.kv[0][1], world.kv[1][1]):
        buffer[slots[:32]] = buffer[slots[:32].roll(16)]
    assert not torch.equal(world.pool.read_bytes("a"), world.pool.expected_bytes("a"))


def test_nothing_is_padded_to_another_adapters_rank() -> None:
    world = make_world()
    for rank in (1, 4, 8, 12, 64):
        world.add(f"r{rank}", *random_adapter(SHAPE, ALL_LINEAR, rank, seed=rank))
    per_rank = sum(sum(SHAPE.features(m)) for m in ALL_LINEAR) * 4  # bytes per layer and LoRA rank
    slot = sum(world.pool.pool.row_bytes)
    for rank in (1, 4, 8, 12, 64):
        ideal = per_rank * rank / slot
        assert ideal <= world.pool.slots_needed(f"r{rank}") <= ideal / (1 - CUT_WORTH) + 1


def test_buffers_have_true_shapes_and_no_memory() -> None:
    world = make_world(tp=(1, 2))
    for buffers in (world.pool.A_buffer, world.pool.B_buffer):
        assert set(buffers) == MODULES
        assert all(t.device.type == "meta" for layers in buffers.values() for t in layers)
    assert world.pool.A_buffer["down_proj"][0].shape == (32, 4, SHAPE.inner // 2)
    assert world.pool.B_buffer["gate_up_proj"][1].shape == (32, SHAPE.inner, 4)


def test_life_of_an_adapter() -> None:
    world = make_world()
    pool = world.pool
    world.add("a", *random_adapter(SHAPE, ["o_proj"], 4, seed=1))
    slots = contiguous_slots(pool.slots_needed("a"), 1)
    pool.prepare_lora_batch({None}, {}, [], {})  # what SGLang does before the pool is bound
    with pytest.raises(RuntimeError, match="not resident: a"):
        pool.prepare_lora_batch({None, "a"}, {}, [], {})
    pool.load("a", slots)
    with pytest.raises(ValueError, match="already resident"):
        pool.load("a", slots)
    pool.prepare_lora_batch({None, "a"}, {}, [], {})
    assert pool.uid_to_buffer_id == {None: 0, "a": 1}
    pool.remove_lora("a")  # SGLang's unload: the slots are still the cache's to free
    pool.remove_lora("a")
    pool.remove_lora("never seen")
    assert set(pool.resident) == {"a"}
    del world.lora_manager.loras["a"]
    pool.drop("a")
    pool.drop("a")
    assert not pool.resident
    with pytest.raises(KeyError, match="not loaded"):
        pool.slots_needed("a")


def test_a_failed_load_leaves_nothing_resident() -> None:
    world = make_world()
    world.add("a", *random_adapter(SHAPE, ["o_proj"], 4, seed=1))
    with pytest.raises(ValueError, match="needs"):
        world.pool.load("a", torch.arange(3))
    assert not world.pool.resident


def test_unbound_pool_says_so() -> None:
    world = make_world()
    world.add("a", *random_adapter(SHAPE, ["o_proj"], 4, seed=1))
    world.pool._pool = None
    with pytest.raises(RuntimeError, match="not bound"):
        world.pool.slots_needed("a")


def test_batch_numbers_do_not_depend_on_set_order() -> None:
    world = make_world(max_loras=6)
    ids = [f"adapter-{i}" for i in range(6)]
    free = 1
    for lora_id in ids:
        world.add(lora_id, *random_adapter(SHAPE, ["o_proj"], 2, seed=1))
        count = world.pool.slots_needed(lora_id)
        world.pool.load(lora_id, torch.arange(free, free + count))
        free += count
    world.pool.prepare_lora_batch({*ids[::-1][:5], None}, {}, [], {})
    assert world.pool.uid_to_buffer_id == {None: 0, **{i: n for n, i in enumerate(ids[1:], start=1)}}
    world.pool.prepare_lora_batch(set(ids), {}, [], {})  # as many adapters as indices
    assert world.pool.uid_to_buffer_id == {i: n for n, i in enumerate(ids)}
    with pytest.raises(RuntimeError, match="--max-loras-per-batch is 6"):
        world.pool.prepare_lora_batch({*ids, None}, {}, [], {})


def test_where_cuda_graphs_have_no_room_for_a_rank_it_is_refused() -> None:
    world = make_world()
    world.add("wide", *random_adapter(SHAPE, ["q_proj"], 8, seed=1, rank_pattern={"q_proj": 24}))
    assert world.pool.largest_rank == 24
    world.pool.most_rank = 24
    config = {"lora_alpha": 16, "target_modules": ["q_proj"]}
    assert world.pool.can_support(LoRAConfig.from_dict({**config, "r": 24}))
    for wider in ({"r": 25}, {"r": 8, "rank_pattern": {"layers.0": 32}}):
        with pytest.raises(AdapterError, match=r"--elora-graph-rank (25|32)"):
            world.pool.can_support(LoRAConfig.from_dict({**config, **wider}))


def test_base_batches_run_before_any_adapter_was_there() -> None:
    """As SGLang captures CUDA graphs and warms up: right after the pool is bound, without asking for adapters."""
    world = make_world()
    assert world.pool.uid_to_buffer_id == {None: 0}
    forward = SimpleNamespace(batch_size=3, extend_seq_lens_cpu=[1, 1, 1], forward_mode=ForwardMode.EXTEND)
    world.lora_manager.lora_backend.prepare_lora_batch(forward, [0, 0, 0], [0] * 32, [0] * 32, False)
    assert not world.lora_manager.lora_backend.batch_info.rows.segments


def test_any_lora_rank_is_supported_but_only_wrapped_modules() -> None:
    pool = make_world().pool
    config = {"peft_type": "LORA", "lora_alpha": 1, "target_modules": ["q_proj", "down_proj"]}
    assert pool.can_support([LoRAConfig.from_dict({**config, "r": r}) for r in (1, 64, 4096)])
    assert pool.can_support(LoRAConfig.from_dict({**config, "r": 8, "target_modules": "all-linear"}))
    with pytest.raises(AdapterError, match="lm_head"):
        pool.can_support(LoRAConfig.from_dict({**config, "r": 8, "target_modules": ["lm_head"]}))


# -- reading PEFT adapters ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "alpha", "rank", "expected"),
    [({}, 16, 8, 2.0), ({"use_rslora": True}, 16, 16, 4.0), ({"use_rslora": False}, 8, 64, 0.125)],
)
def test_scaling(options: dict[str, Any], alpha: int, rank: int, expected: float) -> None:
    assert lora_scaling(options, alpha, rank) == expected
    world = make_world()
    config, tensors = random_adapter(SHAPE, ["o_proj"], rank, seed=1, **options)
    adapter = world.add("a", {**config, "lora_alpha": alpha}, tensors)
    assert adapter.scaling == expected


def effective_delta(world: World, lora_id: str, layer: int, module: str) -> torch.Tensor:
    """``scaling * B @ A`` of a whole (fused) module, from the CPU weights as they go into the pool."""
    adapter = world.lora_manager.loras[lora_id]
    shape = next(s for s in world.pool._shapes(adapter, layer) if s.name == module)
    matrices = world.pool.matrices(adapter, layer)
    delta = torch.zeros(world.layer(layer, module).lora_offsets[-1], shape.in_features)
    first = 0
    for index, part in enumerate(shape.slices, start=1):
        a = matrices[module, 0][first : first + part.rank]
        delta[part.offset : part.offset + part.width] = adapter.scaling * (matrices[module, index].t() @ a)
        first += part.rank
    return delta


@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_and_alpha_patterns_follow_peft(use_rslora: bool) -> None:
    """Each module's delta is its own alpha over its own rank, whatever stock makes of the adapter."""
    world = make_world()
    ranks = {"q_proj": 3, "k_proj": 16, "down_proj": 1}
    alphas = {"v_proj": 5, "down_proj": 7}
    config, tensors = random_adapter(
        SHAPE, ALL_LINEAR, 8, seed=5, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=use_rslora
    )
    world.add("a", config, tensors)
    groups = {
        "qkv_proj": ALL_LINEAR[:3],
        "o_proj": ["o_proj"],
        "gate_up_proj": ALL_LINEAR[4:6],
        "down_proj": ["down_proj"],
    }
    for module, parts in groups.items():
        deltas = []
        for part in parts:
            stem = next(n for n in tensors if "layers.1." in n and f".{part}.lora_A" in n)
            rank = ranks.get(part, 8)
            scale = alphas.get(part, 16) / (rank**0.5 if use_rslora else rank)
            deltas.append(scale * tensors[stem.replace("lora_A", "lora_B")] @ tensors[stem])
        torch.testing.assert_close(effective_delta(world, "a", 1, module), torch.cat(deltas))


def test_adapter_trained_on_fused_modules_stores_its_a_once() -> None:
    world = make_world()
    config, tensors = random_adapter(SHAPE, ["qkv_proj", "gate_up_proj"], 4, seed=6)
    world.add("a", config, tensors)
    assert payload_bytes(world.pool.layout("a")) == sum(t.numel() * 4 for t in tensors.values())
    for module in ("qkv_proj", "gate_up_proj"):
        a, b = (
            next(t for n, t in tensors.items() if f"layers.0.{p}.{module}.lora_{s}" in n)
            for p, s in (("self_attn" if module == "qkv_proj" else "mlp", s) for s in "AB")
        )
        torch.testing.assert_close(effective_delta(world, "a", 0, module), 2.0 * b @ a)


def test_layers_without_lora_take_part_without_weights() -> None:
    world = make_world()
    world.add("a", *random_adapter(SHAPE, ["q_proj", "down_proj"], 4, seed=7, layers=[1]))
    place(world, "a", "contiguous")
    world.batch([("a", 3)])
    x = torch.randn(3, SHAPE.hidden)
    plain = torch.nn.functional.linear(x, world.layer(0, "qkv_proj").base_layer.weight)
    assert torch.equal(world.layer(0, "qkv_proj")(x)[0], plain)
    assert not torch.equal(
        world.layer(1, "qkv_proj")(x)[0],
        torch.nn.functional.linear(x, world.layer(1, "qkv_proj").base_layer.weight),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(n for n in t if "lora_B" in n)), "no other half"),
        (
            lambda t: t.update({"base_model.model.model.layers.0.self_attn.o_proj.bias": torch.ones(4)}),
            "neither",
        ),
        (lambda t: t.update({next(n for n in t if "lora_B" in n): torch.ones(64, 3)}), "one LoRA rank"),
        (
            lambda t: t.update(
                {
                    f"base_model.model.model.layers.0.self_attn.g_proj.lora_{s}.weight": torch.ones(4, 4)
                    for s in "AB"
                }
            ),
            "does not have",
        ),
    ],
)
def test_broken_adapters_are_refused(change: Any, message: str) -> None:
    config, tensors = random_adapter(SHAPE, ["o_proj"], 4, seed=1)
    change(tensors)
    with pytest.raises(AdapterError, match=message):
        make_world().add("a", config, tensors)


def test_adapter_read_without_the_hook_is_refused() -> None:
    world = make_world()
    adapter = world.add("a", *random_adapter(SHAPE, ["o_proj"], 4, seed=1))
    del adapter._elora_lora_ranks
    with pytest.raises(RuntimeError, match="without the hook"):
        world.pool.slots_needed("a")


def test_deltas_are_what_peft_computes() -> None:
    """The whole way against the peft library: its adapter, its state dict, its idea of the scaling."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=SHAPE.hidden,
            num_attention_heads=SHAPE.heads,
            num_key_value_heads=SHAPE.kv_heads,
            head_dim=SHAPE.head_dim,
            intermediate_size=SHAPE.inner,
            num_hidden_layers=SHAPE.layers,
            vocab_size=32,
        )
    )
    options = peft.LoraConfig(
        r=6,
        lora_alpha=10,
        target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        use_rslora=True,
        rank_pattern={"v_proj": 3, "layers.1.mlp.down_proj": 11},
        alpha_pattern={"^model.layers.0.self_attn.q_proj": 4, "up_proj": 5},
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, options)
    tensors = peft.get_peft_model_state_dict(adapted)
    config = {**options.to_dict(), "target_modules": sorted(options.target_modules), "peft_type": "LORA"}
    world = make_world()
    world.add("a", config, {name: tensor.detach() for name, tensor in tensors.items()})
    for layer, decoder in enumerate(adapted.base_model.model.model.layers):
        delta = {
            name: module.get_delta_weight("default").detach() if hasattr(module, "get_delta_weight") else None
            for part in (decoder.self_attn, decoder.mlp)
            for name, module in part.named_children()
        }
        for fused, parts in FUSED.items():
            n_in, _ = SHAPE.features(fused)
            rows = [
                torch.zeros(SHAPE.features(part)[1], n_in) if delta[part] is None else delta[part]
                for part in parts
            ]
            torch.testing.assert_close(effective_delta(world, "a", layer, fused), torch.cat(rows))
        torch.testing.assert_close(effective_delta(world, "a", layer, "down_proj"), delta["down_proj"])


def test_the_pool_is_made_where_its_base_class_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a server: SGLang's plugin registry puts the replacement into every module that imported the class."""
    monkeypatch.setattr(memory_pool, "LoRAMemoryPool", EloraLoRAMemoryPool)
    assert isinstance(make_world().pool, EloraLoRAMemoryPool)
