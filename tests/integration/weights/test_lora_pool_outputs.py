"""Layer outputs with weights in pool pages against SGLang's slot buffers and its torch_native backend."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from sglang.srt.lora import layers as lora_layers
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

SHAPE = Shape()
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "v_proj"]
SLOTS = 16384

#: lora_id -> (modules, LoRA rank)
ADAPTERS: dict[str, tuple[list[str], int]] = {
    "r1": (ALL_LINEAR, 1),
    "r4": (ATTENTION, 4),
    "r8": (ALL_LINEAR, 8),
    "r12": (["gate_proj", "up_proj", "down_proj"], 12),
    "r64": (ALL_LINEAR, 64),
}

BATCHES: dict[str, list[tuple[str | None, int]]] = {
    "prefill": [("r8", 9), (None, 4), ("r1", 30), ("r64", 5), ("r12", 2), ("r4", 7)],
    "decode": [([None, *ADAPTERS][i * 5 % 6], 1) for i in range(24)],
    "empty segments": [("r4", 0), ("r64", 3), (None, 0), ("r1", 0), ("r8", 2), (None, 1)],
    "chunk with decode tokens": [("r12", 40), ("r8", 1), (None, 1), ("r8", 1), ("r12", 1)],
}


def load_all(world: World, order: str) -> None:
    free = 1
    page = world.pool.pool.page_size
    scattered = scattered_slots(SLOTS, SLOTS, page, seed=9)
    for number, (lora_id, (modules, rank)) in enumerate(ADAPTERS.items()):
        world.add(lora_id, *random_adapter(SHAPE, modules, rank, seed=number))
        count = world.pool.slots_needed(lora_id)
        if order == "contiguous":
            world.pool.load(lora_id, contiguous_slots(count, page, first_page=free))
        else:
            world.pool.load(lora_id, scattered[(free - 1) * page :][:count])
        free += count // page


@functools.cache
def stock_world(dtype: torch.dtype, tp: tuple[int, int]) -> World:
    world = make_world(dtype=dtype, tp=tp, stock=True)
    for number, (lora_id, (modules, rank)) in enumerate(ADAPTERS.items()):
        world.add(lora_id, *random_adapter(SHAPE, modules, rank, seed=number))
    return world


class SumOverRanks:
    """Stands in for the all-reduce of two tp ranks that run one after the other in this process.

    Call k of one rank belongs to call k of the other. The first pass records what each rank brings,
    the second hands out the sums.
    """

    def __init__(self) -> None:
        self.brought: list[list[torch.Tensor]] = []
        self.summing = False

    def start(self) -> None:
        self.calls = iter(range(1000))

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        call = next(self.calls)
        if self.summing:
            return torch.stack(self.brought[call]).sum(0)
        while len(self.brought) <= call:
            self.brought.append([])
        self.brought[call].append(tensor.clone())
        return tensor


def outputs(
    worlds: list[World], requests: list[tuple[str | None, int]], dtype: torch.dtype
) -> dict[Any, torch.Tensor]:
    """Output of every linear layer for one random input, tp shards put together again."""
    rows = sum(count for _, count in requests)
    found: dict[Any, torch.Tensor] = {}
    for world in worlds:
        world.batch(requests)
    tp_size = len(worlds)
    for layer in range(SHAPE.layers):
        for module in sorted(MODULES):
            n_in, _ = SHAPE.features(module)
            x = torch.randn(rows, n_in, generator=torch.Generator().manual_seed(layer)).to(dtype)
            row_parallel = module in ("o_proj", "down_proj")
            reduce = SumOverRanks()
            for reduce.summing in (False, True):
                parts = []
                for tp_rank, world in enumerate(worlds):
                    reduce.start()
                    part = x.chunk(tp_size, dim=1)[tp_rank].contiguous() if row_parallel else x
                    with tp_shard(tp_rank, tp_size), pytest.MonkeyPatch.context() as patch:
                        patch.setattr(lora_layers, "tensor_model_parallel_all_reduce", reduce)
                        patch.setattr(lora_layers, "should_skip_mlp_all_reduce", lambda: False)
                        parts.append(world.layer(layer, module)(part)[0])
            if row_parallel:
                assert all(torch.equal(parts[0], part) for part in parts)
                found[layer, module] = parts[0]
            else:
                edges = worlds[0].layer(layer, module).lora_offsets
                spans = list(itertools.pairwise(edges))
                found[layer, module] = torch.cat([part[:, a:b] for a, b in spans for part in parts], dim=1)
    return found


def assert_equal(
    found: dict[Any, torch.Tensor], expected: dict[Any, torch.Tensor], dtype: torch.dtype
) -> None:
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 8e-2, torch.float16: 2e-2}[dtype]
    for key, tensor in expected.items():
        torch.testing.assert_close(
            found[key], tensor, atol=tolerance, rtol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("requests", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "page_size", "order", "tp_size"),
    [
        (torch.float32, torch.float32, 1, "contiguous", 1),
        (torch.float32, torch.float32, 16, "scattered", 1),
        (torch.float32, torch.float8_e4m3fn, 1, "scattered", 1),
        (torch.float32, torch.bfloat16, 16, "contiguous", 2),
        (torch.float32, torch.float32, 1, "scattered", 2),
        (torch.bfloat16, torch.bfloat16, 1, "contiguous", 1),
        (torch.bfloat16, torch.float8_e5m2, 16, "scattered", 2),
        (torch.float16, torch.float16, 1, "contiguous", 1),
    ],
    ids=str,
)
def test_equal_to_stock_slot_buffers(
    dtype: torch.dtype, kv_dtype: torch.dtype, page_size: int, order: str, tp_size: int, requests: list[Any]
) -> None:
    worlds = []
    for tp_rank in range(tp_size):
        with tp_shard(tp_rank, tp_size):
            world = make_world(
                dtype=dtype, kv_dtype=kv_dtype, page_size=page_size, tp=(tp_rank, tp_size), slots=SLOTS
            )
            load_all(world, order)
        worlds.append(world)
    expected = outputs(
        [stock_world(dtype, (tp_rank, tp_size)) for tp_rank in range(tp_size)], requests, dtype
    )
    assert_equal(outputs(worlds, requests, dtype), expected, dtype)


def test_swapped_pages_are_noticed() -> None:
    """Negative control: with two pages of one adapter swapped, the comparison above must fail."""
    world = make_world(page_size=16, slots=SLOTS)
    load_all(world, "contiguous")
    expected = outputs([stock_world(torch.float32, (0, 1))], BATCHES["prefill"], torch.float32)
    assert_equal(outputs([world], BATCHES["prefill"], torch.float32), expected, torch.float32)
    pages = world.pool.resident["r8"][:32]
    for buffers in world.kv:
        buffers[1][pages] = buffers[1][pages.roll(16)]
    with pytest.raises(AssertionError):
        assert_equal(outputs([world], BATCHES["prefill"], torch.float32), expected, torch.float32)


def test_base_requests_alone_run_no_lora_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()
    world.lora_manager.lora_backend.batch_info = None  # what SGLang leaves for such a batch, see below
    assert world.lora_manager.lora_backend.skip_inactive_lora_batches
    monkeypatch.setattr(type(world.lora_manager.lora_backend), "forward_with_base", None)
    layer = world.layer(0, "qkv_proj")
    x = torch.randn(3, SHAPE.hidden)
    with tp_shard(0, 1):
        assert torch.equal(layer(x)[0], torch.nn.functional.linear(x, layer.base_layer.weight))


def test_more_adapters_in_one_batch_than_stock_has_slots() -> None:
    world = make_world(max_loras=65, slots=8192)
    free = 1
    for number in range(64):
        world.add(f"a{number}", *random_adapter(SHAPE, ["o_proj"], 1 + number % 5, seed=number))
        count = world.pool.slots_needed(f"a{number}")
        world.pool.load(f"a{number}", torch.arange(free, free + count))
        free += count
    requests: list[tuple[str | None, int]] = [(None, 2), *((f"a{n}", 1) for n in range(64))]
    world.batch(requests)
    x = torch.randn(66, SHAPE.features("o_proj")[0])
    with tp_shard(0, 1):
        mixed = world.layer(0, "o_proj")(x)[0]
        for number in (0, 31, 63):
            world.batch([(f"a{number}", 1)])
            alone = world.layer(0, "o_proj")(x[2 + number : 3 + number])[0]
            torch.testing.assert_close(mixed[2 + number : 3 + number], alone, atol=1e-5, rtol=1e-5)


def test_cuda_graphs_are_refused() -> None:
    backend = make_world().lora_manager.lora_backend
    with pytest.raises(RuntimeError, match="--disable-cuda-graph"):
        backend.prepare_lora_batch(None, [], [], [], use_cuda_graph=True)


def test_embedding_targets_are_refused_before_layers_are_wrapped() -> None:
    with pytest.raises(ValueError, match=r"lm_head.*--lora-target-modules"):
        make_world().lora_manager.lora_backend.validate_lora_targets(torch.nn.Module(), {"q_proj", "lm_head"})
