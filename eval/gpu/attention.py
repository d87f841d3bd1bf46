"""FlashInfer's paged attention on a pool that holds adapters: it must see the KV of its requests and nothing else.

Free slots hold what adapters left there, as NaN: an attention that read the rest of a request's last page, or another
page, would show it. SGLang's Triton attention is tested the same way in Triton's interpreter (``tests/kernels``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from elora_sglang.eval.gpu.cases.paged_lora import make_inputs

PAGE, KV_HEADS, HEADS, SIZE = 16, 8, 32, 128
LENGTHS = (3 * PAGE + 5, 1, 2 * PAGE, 7)
WORKSPACE = 128 * 2**20


@dataclass
class Scene:
    """A pool of bf16 rows with adapters and the KV of some requests in scattered pages.

    ``keys``, ``values``: ``[pages, PAGE, KV_HEADS, SIZE]``, views of the pool; ``pages``: of each request, in order.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pages: list[torch.Tensor]
    q: torch.Tensor
    lora: Callable[[], float]

    def expected(self) -> torch.Tensor:
        """``[requests, HEADS, SIZE]`` in float64."""
        found = []
        for row, (length, pages) in enumerate(zip(LENGTHS, self.pages, strict=True)):
            k, v = (one[pages].flatten(0, 1)[:length].double() for one in (self.keys, self.values))
            k, v = (one.repeat_interleave(HEADS // KV_HEADS, 1) for one in (k, v))
            weights = torch.einsum("hd,thd->ht", self.q[row].double(), k) / SIZE**0.5
            found.append(torch.einsum("ht,thd->hd", weights.softmax(-1), v))
        return torch.stack(found)


def scene(seed: int, device: torch.device) -> Scene:
    """A fresh one; ``lora`` is how far the adapters' own products are from what their matrices give."""
    needed = sum(-(-length // PAGE) for length in LENGTHS)
    inputs = make_inputs(
        seed=seed, ranks=[16, 64], rows=[(0, 3), (1, 2)], in_features=256, widths=(256,), dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16, kv_row=(KV_HEADS, SIZE), page_size=PAGE, scattered=True, spare_pages=needed + 4,
        device=device,
    )  # fmt: skip
    pool = inputs.adapters[0].pool
    streams = [pool.byte_rows(0, stream) for stream in (0, 1)]
    taken = torch.cat([one.slots for one in inputs.adapters]).unique().cpu()
    free = torch.ones(len(streams[0]), dtype=torch.bool)
    free[taken] = False
    generator = torch.Generator().manual_seed(seed)
    pages = free.view(-1, PAGE).all(1).nonzero().flatten()[1:]
    pages = pages[torch.randperm(len(pages), generator=generator)]
    keys, values = (rows.view(torch.bfloat16).view(-1, PAGE, KV_HEADS, SIZE) for rows in streams)
    for rows in streams:
        rows[free.nonzero().flatten().to(device)] = 0xFF  # NaN as bf16
    mine = []
    for length in LENGTHS:
        count = -(-length // PAGE)
        own, pages = pages[:count].to(device), pages[count:]
        slots = (own[:, None] * PAGE + torch.arange(PAGE, device=device)).flatten()[:length]
        for one in (keys, values):
            fresh = torch.randn(length, KV_HEADS, SIZE, generator=generator)
            one.view(-1, KV_HEADS, SIZE)[slots] = fresh.to(torch.bfloat16).to(device)
        mine.append(own)
    q = torch.randn(len(LENGTHS), HEADS, SIZE, generator=generator).to(torch.bfloat16).to(device)

    def lora() -> float:
        from elora_sglang.kernels.paged_lora import triton_kernel

        found = triton_kernel.add_lora(
            inputs.x, inputs.out.clone(), inputs.device_batch(), inputs.place(), triton_kernel.Config()
        )
        right = inputs.expected()
        return float((found.double() - right).norm() / right.norm())

    return Scene(keys, values, mine, q, lora)


def tables(pages: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's page table: (indptr, indices, last_page_len), int32."""
    counts = torch.tensor([0, *(len(one) for one in pages)]).cumsum(0).to(torch.int32)
    last = torch.tensor([(length - 1) % PAGE + 1 for length in LENGTHS], dtype=torch.int32)
    device = pages[0].device
    return counts.to(device), torch.cat(list(pages)).to(torch.int32), last.to(device)


def check(wrapper: Any, seed: int, device: torch.device) -> dict[str, float]:
    """Relative errors of a ``BatchDecodeWithPagedKVCacheWrapper`` ("attention") and of the adapters beside it ("lora").

    Raises AssertionError where it saw what is not its request's.
    """
    here = scene(seed, device)
    bf16 = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(*tables(here.pages), HEADS, KV_HEADS, SIZE, PAGE, **bf16)
    found, right = wrapper.run(here.q, (here.keys, here.values)), here.expected()
    error = float((found.double() - right).norm() / right.norm())
    if not error < 0.02:
        raise AssertionError(f"attention over the pool is off by {error:.3g}")
    return {"attention": error, "lora": here.lora()}


def flashinfer(seed: int, device: torch.device) -> dict[str, Any]:
    """:func:`check` with FlashInfer, ``{"fault": what}``, or ``{"skipped": why}`` where it cannot be run."""
    if device.type != "cuda":
        return {"skipped": "not compared: no CUDA device"}
    try:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
    except ImportError as error:
        return {"skipped": f"not compared: {error}"}
    try:
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        return {**check(BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD"), seed, device)}
    except AssertionError as error:
        return {"fault": str(error)}
    except Exception as error:  # its kernels are compiled on first use, which a machine may not be able to
        return {"skipped": f"not compared: {error}"}
