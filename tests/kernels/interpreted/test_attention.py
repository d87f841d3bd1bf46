"""SGLang's own Triton attention over a pool that holds adapters: it must see KV and nothing else.

Free slots hold what adapters left there, as NaN here: a kernel that read a whole page and masked its product instead of
its load would give NaN.
"""

from __future__ import annotations

import random

import pytest
import torch
from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd
from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

from elora_sglang.eval.gpu.cases.paged_lora import Inputs, make_inputs

SEED = random.SystemRandom().randrange(2**31)
KV_HEADS, SIZE = 2, 16
LENGTHS = (19, 1)


class Served:
    """Adapters in a pool, and the KV of a few requests in the pages between them."""

    def __init__(self, page_size: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(SEED)
        self.inputs: Inputs = make_inputs(
            seed=SEED, ranks=[8, 12], rows=[(0, 3), (1, 2)], dtype=dtype, kv_dtype=dtype,
            kv_row=(KV_HEADS, SIZE), page_size=page_size, scattered=True, spare_pages=64 // page_size,
        )  # fmt: skip
        pool = self.inputs.adapters[0].pool
        self.keys, self.values = (
            pool.byte_rows(0, stream).view(dtype).view(-1, KV_HEADS, SIZE) for stream in (0, 1)
        )
        taken = torch.cat([one.slots for one in self.inputs.adapters]).unique()
        free = torch.ones(len(self.keys), dtype=torch.bool)
        free[taken] = False
        for rows in (self.keys, self.values):
            rows.view(torch.uint8)[free] = 0xFF
        pages = free.view(-1, page_size).all(1).nonzero().flatten()[1:]
        pages = pages[torch.randperm(len(pages), generator=self.generator)]
        slots = (pages[:, None] * page_size + torch.arange(page_size)).flatten()
        self.slots = []
        for length in LENGTHS:
            whole = -(-length // page_size) * page_size
            self.slots.append(slots[:length])
            slots = slots[whole:]
        for mine in self.slots:
            self.keys[mine] = self.random(len(mine), KV_HEADS).to(dtype)
            self.values[mine] = self.random(len(mine), KV_HEADS).to(dtype)

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, SIZE, generator=self.generator)

    def expected(self, q: torch.Tensor, request: int, visible: int) -> torch.Tensor:
        """Attention of one row ``[heads, size]`` over a request's first tokens, in float64."""
        mine = self.slots[request][:visible]
        group = q.shape[0] // KV_HEADS
        k = self.keys[mine].double().repeat_interleave(group, 1)
        v = self.values[mine].double().repeat_interleave(group, 1)
        weights = torch.einsum("hd,thd->ht", q.double(), k) / SIZE**0.5
        return torch.einsum("ht,thd->hd", weights.softmax(-1), v)


def ends(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize(
    ("dtype", "page_size", "heads"),
    [(torch.float16, 16, 4 * KV_HEADS), (torch.float32, 16, KV_HEADS), (torch.float32, 1, 4 * KV_HEADS)],
)
def test_decode_sees_kv_and_nothing_else(dtype: torch.dtype, page_size: int, heads: int) -> None:
    print(f"seed {SEED}")
    served, splits = Served(page_size, dtype), 2
    count = len(LENGTHS)
    q = served.random(count, heads).to(dtype)
    out = torch.full((count, heads, SIZE), float("nan"), dtype=dtype)
    decode_attention_fwd(
        q, served.keys, served.values, out, ends(list(LENGTHS)), torch.cat(served.slots),
        torch.full((count, heads, splits, SIZE), float("nan")), torch.full((count, heads, splits), float("nan")),
        torch.full((count,), splits, dtype=torch.int32), splits, SIZE**-0.5, 1.0, 1.0, page_size=page_size,
    )  # fmt: skip
    right = torch.stack([served.expected(q[i], i, LENGTHS[i]) for i in range(count)])
    torch.testing.assert_close(out.double(), right, rtol=5e-3, atol=5e-3)
    served.values[served.slots[1][0]] += 1.0
    wrong = torch.stack([served.expected(q[i], i, LENGTHS[i]) for i in range(count)])
    assert not torch.allclose(out.double(), wrong, rtol=5e-3, atol=5e-3), "the check sees one wrong token"


@pytest.mark.parametrize("page_size", [1, 16])
def test_prefill_sees_kv_and_nothing_else(page_size: int) -> None:
    print(f"seed {SEED}")
    served, heads = Served(page_size, torch.float32), 2 * KV_HEADS
    prefixes = [length // 2 for length in LENGTHS]
    new = [length - prefix for length, prefix in zip(LENGTHS, prefixes, strict=True)]
    q = served.random(sum(new), heads)
    out = torch.full((sum(new), heads, SIZE), float("nan"))
    fresh = torch.cat([mine[prefix:] for mine, prefix in zip(served.slots, prefixes, strict=True)])
    extend_attention_fwd(
        q, served.keys[fresh].contiguous(), served.values[fresh].contiguous(), out, served.keys, served.values,
        ends(new), ends(prefixes), torch.cat([m[:p] for m, p in zip(served.slots, prefixes, strict=True)]),
        None, True, None, max(new), 1.0, 1.0, page_size=page_size,
    )  # fmt: skip
    row, right = 0, []
    for request, (prefix, count) in enumerate(zip(prefixes, new, strict=True)):
        for place in range(count):
            right.append(served.expected(q[row], request, prefix + place + 1))
            row += 1
    torch.testing.assert_close(out.double(), torch.stack(right), rtol=1e-4, atol=1e-4)
