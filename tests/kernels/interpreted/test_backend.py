"""The LoRA backend through the Triton kernels, as on a GPU but for the device: eager, graphs, row-parallel layers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from elora_sglang.eval.gpu.cases.paged_lora import MODULE, Inputs, make_inputs
from elora_sglang.integration.weights import kernels as lora_kernels
from elora_sglang.integration.weights.backend import EloraLoRABackend
from elora_sglang.integration.weights.pool import PLACE

ROWS = [(0, 1), (1, 1), (None, 1), (2, 1), (0, 1)]


class Memory:
    """As much of ``EloraLoRAMemoryPool`` as the backend asks for."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.target_modules = {MODULE}
        self.pool, self.dtype = inputs.adapters[0].pool, inputs.adapters[0].dtype
        self.num_layer, self.max_lora_rank, self.max_loras_per_batch = 1, 64, 8
        self.batch_adapters = [None, *inputs.adapters]
        self.most_rank: int | None = None
        self.graph_rank, self.largest_rank = 128, 64
        self.waited: list[int] = []

    def wait_layer(self, layer: int) -> None:
        self.waited.append(layer)

    def part_widths(self, layer: int, module: str) -> tuple[int, ...]:
        return self.inputs.widths


def backend(inputs: Inputs) -> EloraLoRABackend:
    made = EloraLoRABackend(8, torch.device("cpu"))
    made.uses_triton = True
    made.memory_pool = Memory(inputs)  # type: ignore[assignment]
    return made


def prepare(one: EloraLoRABackend, inputs: Inputs, rows: list[tuple[int | None, int]], **how: Any) -> None:
    forward = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND if not how else ForwardMode.DECODE,
        extend_seq_lens_cpu=[count for _, count in rows],
        batch_size=len(rows),
        input_ids=torch.zeros(sum(count for _, count in rows)),
        spec_info=None,
    )
    indices = [0 if index is None else index + 1 for index, _ in rows]
    one.prepare_lora_batch(
        forward,
        indices,
        [0] * 8,
        [0.0, *inputs.scalings],
        how.get("graph", False),  # type: ignore[arg-type]
    )


def apply(one: EloraLoRABackend, inputs: Inputs, **how: Any) -> torch.Tensor:
    place = torch.empty(1, device="meta")
    setattr(place, PLACE, (0, MODULE))
    return one.forward_with_base(None, inputs.x, lambda: inputs.out.clone(), place, place, None, None, **how)


def close(found: torch.Tensor, inputs: Inputs) -> None:
    torch.testing.assert_close(found.double(), inputs.expected(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("rows", [ROWS, [(0, 20), (None, 3), (2, 70), (1, 1)]], ids=["decode", "prefill"])
def test_a_batch_through_the_kernels(rows: list[tuple[int | None, int]]) -> None:
    inputs = make_inputs(seed=1, ranks=[8, 3, 64], rows=rows, widths=(32, 16), scattered=True)
    one = backend(inputs)
    prepare(one, inputs, rows)
    close(apply(one, inputs), inputs)
    reduced: list[tuple[int, ...]] = []

    def all_reduce(part: torch.Tensor) -> torch.Tensor:
        reduced.append(tuple(part.shape))
        return part

    close(apply(one, inputs, all_reduce=all_reduce), inputs)
    assert len(reduced) == 2 and one.memory_pool.waited == [0, 0]  # type: ignore[union-attr]


def test_few_rows_share_out_the_input_features(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(
        seed=4, ranks=[8, 3, 24], rows=ROWS, in_features=1024, widths=(32, 16), scattered=True
    )
    one = backend(inputs)
    prepare(one, inputs, ROWS)
    splits: list[int] = []
    original = lora_kernels.kernel.shrink_into

    def noted(*arguments: Any) -> None:
        splits.append(arguments[-1].splits)
        original(*arguments)

    monkeypatch.setattr(lora_kernels.kernel, "shrink_into", noted)
    close(apply(one, inputs), inputs)
    close(apply(one, inputs, all_reduce=lambda part: part), inputs)
    assert splits == [8, 8]


def test_graphs_read_tables_that_stay_where_they_are() -> None:
    inputs = make_inputs(seed=2, ranks=[8, 3, 64], rows=ROWS, widths=(32, 16), scattered=True)
    one = backend(inputs)
    one.init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph=8, num_tokens_per_req=1)
    base = [(None, 1)] * len(ROWS)
    prepare(one, inputs, base, graph=True)  # as when the graph is captured
    captured = one.batch_info.tables
    assert torch.equal(apply(one, inputs), inputs.out), "no tile has rows: nothing is added"
    prepare(one, inputs, ROWS, graph=True)
    assert one.memory_pool.waited == [0, 0], "loads are waited for before a replay"  # type: ignore[union-attr]
    replayed = one.batch_info.tables
    for name in ("order", "tiles", "adapters", "scalings"):
        assert getattr(replayed, name).data_ptr() == getattr(captured, name).data_ptr()
    one.batch_info.tables = captured  # what the captured kernels were started with
    close(apply(one, inputs), inputs)
    prepare(one, inputs, base, graph=True)
    assert torch.equal(apply(one, inputs), inputs.out), "tiles of the batch before are gone"


def test_what_graphs_have_no_room_for_is_refused() -> None:
    inputs = make_inputs(seed=3, ranks=[8], rows=[(0, 1)] * 3)
    one = backend(inputs)
    with pytest.raises(RuntimeError, match="no tables were reserved"):
        prepare(one, inputs, [(0, 1)] * 3, graph=True)
    one.init_decode_cuda_graph_batch_info(max_bs_in_cuda_graph=2, num_tokens_per_req=1)
    with pytest.raises(ValueError, match="a batch of 3 rows"):
        prepare(one, inputs, [(0, 1)] * 3, graph=True)
    assert one.memory_pool.most_rank == 128  # type: ignore[union-attr]
