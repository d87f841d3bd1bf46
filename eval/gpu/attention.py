"""FlashInfer's paged attention on a pool that holds adapters: it must see the KV of its requests and nothing else.

Free slots hold what adapters left there, as NaN: an attention that read the rest of a request's last page, or another
page, would show it. SGLang's Triton attention is tested the same way in Triton's interpreter (``tests/kernels``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from elora_sglang.eval.gpu.cases import paged_lora

PAGE, KV_HEADS, HEADS, SIZE = 16, 8, 32, 128
LENGTHS = (3 * PAGE + 5, 1, 2 * PAGE, 7)
#: Pages of each request, and where they begin among those of all.
PAGES = [-(-length // PAGE) for length in LENGTHS]
STARTS = [sum(PAGES[:request]) for request in range(len(PAGES) + 1)]
WORKSPACE = 128 * 2**20


def _off(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


def check(wrapper: Any, seed: int, device: torch.device) -> dict[str, float]:
    """Relative errors of a ``BatchDecodeWithPagedKVCacheWrapper`` ("attention") and of the adapters beside it ("lora").

    The KV of the requests lies in scattered pages of a fresh pool of bf16 rows with adapters. Raises AssertionError
    where attention saw what is not its request's.
    """
    inputs = paged_lora.make_inputs(
        seed=seed, ranks=[16, 64], rows=[(0, 3), (1, 2)], in_features=256, widths=(256,), dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16, kv_row=(KV_HEADS, SIZE), page_size=PAGE, scattered=True, spare_pages=STARTS[-1] + 4,
        device=device,
    )  # fmt: skip
    pool = inputs.adapters[0].pool
    streams = [pool.byte_rows(0, stream) for stream in (0, 1)]
    free = torch.ones(len(streams[0]), dtype=torch.bool)
    free[torch.cat([one.slots for one in inputs.adapters]).cpu()] = False
    for rows in streams:
        rows[free.nonzero().flatten().to(device)] = 0xFF  # NaN as bf16
    generator = torch.Generator().manual_seed(seed)
    pages = free.view(-1, PAGE).all(1).nonzero().flatten()[1:]
    pages = pages[torch.randperm(len(pages), generator=generator)][: STARTS[-1]].to(device)
    keys, values = (rows.view(torch.bfloat16).view(-1, PAGE, KV_HEADS, SIZE) for rows in streams)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(torch.bfloat16).to(device)

    q, right = random(len(LENGTHS), HEADS, SIZE), []
    for request, length in enumerate(LENGTHS):
        own = pages[STARTS[request] : STARTS[request + 1]]
        slots = (own[:, None] * PAGE + torch.arange(PAGE, device=device)).flatten()[:length]
        k, v = random(length, KV_HEADS, SIZE), random(length, KV_HEADS, SIZE)
        keys.view(-1, KV_HEADS, SIZE)[slots], values.view(-1, KV_HEADS, SIZE)[slots] = k, v
        query, key, value = (
            part[None].double() for part in (q[request, :, None], k.transpose(0, 1), v.transpose(0, 1))
        )
        right.append(functional.scaled_dot_product_attention(query, key, value, enable_gqa=True))
    # FlashInfer's page table: indptr, indices, last_page_len.
    last = [(length - 1) % PAGE + 1 for length in LENGTHS]
    indptr, last_page = (
        torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (STARTS, last)
    )
    bf16 = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    wrapper.plan(indptr, pages.to(torch.int32), last_page, HEADS, KV_HEADS, SIZE, PAGE, **bf16)
    error = _off(wrapper.run(q, (keys, values)), torch.cat(right)[:, :, 0])
    if not error < 0.02:
        raise AssertionError(f"attention over the pool is off by {error:.3g}")
    lora = paged_lora.case("beside attention", inputs).run["triton"]()
    return {"attention": error, "lora": _off(lora, inputs.expected())}


def flashinfer(seed: int, device: torch.device) -> dict[str, Any]:
    """:func:`check` with FlashInfer, ``{"fault": what}``, or ``{"skipped": why}`` where it cannot be run."""
    if device.type != "cuda":
        return {"skipped": "not compared: no CUDA device"}
    try:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        return {**check(BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD"), seed, device)}
    except AssertionError as error:
        return {"fault": str(error)}
    except Exception as error:  # its kernels are compiled on first use, which a machine may not be able to
        return {"skipped": f"not compared: {error}"}
