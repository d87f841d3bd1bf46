"""Attention of new tokens over cached ones, in plain torch: the arithmetic of the CPU backend.

A request has ``prefix`` cached tokens and ``new`` tokens; new token i sees positions 0 .. prefix + i. The mask is
therefore a rectangle of ``new`` by ``prefix + new`` with a triangle at its end, and the cost of a cache hit is that of
its new tokens. Requests of similar shape share one padded call; long ones run alone in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import scaled_dot_product_attention

ROWS_PER_BLOCK = 256  # query rows per call of a long request: bounds the mask, and skips keys they cannot see
ALONE_ABOVE = 1 << 16  # query rows times keys from which a request is not padded together with others
PADDING_LIMIT = 1.3  # the longest of a group may have this many times the keys of the shortest


@dataclass
class Group:
    """Requests that share one attention call.

    ``rows [g, T]``: rows of the flat query; ``slots [g, L]``: their keys in the pool. Shorter requests repeat
    their last row and slot; ``last_key [g, T]`` is the last key position a row may see and ``real [g, T]`` marks
    rows that are not padding (None: all are).
    """

    rows: torch.Tensor
    slots: torch.Tensor
    last_key: torch.Tensor
    real: torch.Tensor | None
    _masks: dict[int, torch.Tensor | None] = field(default_factory=dict)

    def mask(self, window: int) -> torch.Tensor | None:
        """Bool ``[g, 1, T, L]``, true where a row sees a key; None when every row sees all. Cached per window.

        ``window``: a row at position p sees keys from p - window on; -1: all of them.
        """
        if window not in self._masks:
            keys = torch.arange(self.slots.shape[1])
            seen = keys <= self.last_key[..., None]
            if window >= 0:
                seen &= keys >= self.last_key[..., None] - window
            self._masks[window] = None if bool(seen.all()) else seen[:, None]
        return self._masks[window]


def plan(
    slots_of: torch.Tensor, pool_rows: Sequence[int], new: Sequence[int], total: Sequence[int]
) -> list[Group]:
    """Group the requests of a batch; made once per forward pass and used by every layer.

    ``slots_of``: table ``[requests, positions]`` of pool slots; ``pool_rows``: each request's row in it; ``new``:
    its query rows, in the order of the flat query; ``total``: its keys, new ones included. A request without new
    rows is left out.
    """
    starts = [0]
    for length in new:
        starts.append(starts[-1] + length)
    order = sorted((i for i in range(len(new)) if new[i] > 0), key=lambda i: (new[i], total[i]))
    groups: list[list[int]] = []
    for i in order:
        first = groups[-1][0] if groups else None
        if (
            first is not None
            and new[i] <= max(new[first] * PADDING_LIMIT, new[first] + 4)
            and total[i] <= max(total[first] * PADDING_LIMIT, total[first] + 16)
            and total[i] >= total[first] / PADDING_LIMIT - 16
            and new[i] * total[i] <= ALONE_ABOVE
        ):
            groups[-1].append(i)
        else:
            groups.append([i])
    return [_group(slots_of, members, pool_rows, starts, new, total) for members in groups]


def _group(
    slots_of: torch.Tensor,
    members: list[int],
    pool_rows: Sequence[int],
    starts: list[int],
    new: Sequence[int],
    total: Sequence[int],
) -> Group:
    count = torch.tensor([new[i] for i in members])[:, None]
    keys = torch.tensor([total[i] for i in members])[:, None]
    begin = torch.tensor([starts[i] for i in members])[:, None]
    row = torch.arange(int(count.max()))
    position = torch.arange(int(keys.max()))
    inside = torch.minimum(row, count - 1)
    table_rows = torch.tensor([pool_rows[i] for i in members])[:, None]
    ragged = bool((count != count[0]).any())
    return Group(
        rows=begin + inside,
        slots=slots_of[table_rows, torch.minimum(position, keys - 1)].long(),
        last_key=keys - count + inside,
        real=(row < count) if ragged else None,
    )


def attend(
    group: Group,
    query: torch.Tensor,
    output: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    logit_cap: float = 0.0,
    window: int = -1,
) -> None:
    """Attention of one group; writes its rows of ``output``.

    ``query [rows, heads, D]``, ``output [rows, heads, Dv]``; pool buffers ``keys [slots, kv_heads, D]`` and
    ``values [slots, kv_heads, Dv]`` of any dtype torch can convert to the query's. ``logit_cap`` above 0: scores pass
    through cap * tanh(score / cap) (Gemma 2, arXiv 2408.00118).
    """
    k = gather(keys, group.slots, query.dtype)
    v = gather(values, group.slots, query.dtype)
    if group.rows.shape[0] == 1:
        _attend_alone(group, query, output, k, v, scaling, logit_cap, window)
        return
    mixed = _attention(query[group.rows].transpose(1, 2), k, v, group.mask(window), scaling, logit_cap)
    mixed = mixed.transpose(1, 2)
    if group.real is None:
        output[group.rows] = mixed
    else:
        output[group.rows[group.real]] = mixed[group.real]


def gather(buffer: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``slots [g, L]`` of a pool buffer ``[slots, kv_heads, D]`` as ``[g, kv_heads, L, D]`` in ``dtype``.

    One-byte dtypes (fp8) are gathered as bytes: torch indexes those on every CPU.
    """
    raw = buffer.view(torch.uint8) if buffer.dtype.itemsize == 1 else buffer
    rows = raw.index_select(0, slots.reshape(-1)).view(buffer.dtype).to(dtype)
    return rows.view(*slots.shape, *buffer.shape[1:]).transpose(1, 2)


def _attend_alone(
    group: Group,
    query: torch.Tensor,
    output: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
    logit_cap: float,
    window: int,
) -> None:
    """One request, its rows being contiguous in the flat query: a block of rows sees only the keys before its end."""
    start, new = int(group.rows[0, 0]), group.rows.shape[1]
    prefix = k.shape[2] - new
    if prefix == 0 and new > 1 and logit_cap == 0.0 and window < 0:
        mine = query[start : start + new].transpose(0, 1)[None]
        out = scaled_dot_product_attention(
            mine, k, v, scale=scaling, is_causal=True, enable_gqa=k.shape[1] != mine.shape[1]
        )
        output[start : start + new] = out[0].transpose(0, 1)
        return
    mask = group.mask(window)
    for first in range(0, new, ROWS_PER_BLOCK):
        last = min(new, first + ROWS_PER_BLOCK)
        seen = prefix + last
        block = query[start + first : start + last].transpose(0, 1)[None]
        allowed = None if mask is None else mask[:, :, first:last, :seen]
        out = _attention(block, k[:, :, :seen], v[:, :, :seen], allowed, scaling, logit_cap)
        output[start + first : start + last] = out[0].transpose(0, 1)


def _attention(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    logit_cap: float,
) -> torch.Tensor:
    """``query [g, heads, T, D]`` over ``k, v [g, kv_heads, L, D]``: ``[g, heads, T, Dv]``.

    The query heads of one KV head become rows of one call, so that keys and values are never repeated.
    """
    g, heads, rows, width = query.shape
    kv_heads = k.shape[1]
    share = heads // kv_heads
    folded = query.reshape(g, kv_heads, share * rows, width)
    if mask is not None and share > 1 and rows > 1:
        mask = mask.repeat(1, 1, share, 1)
    if logit_cap > 0.0:
        scores = (folded @ k.transpose(2, 3)) * scaling
        scores = logit_cap * torch.tanh(scores / logit_cap)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v
    else:
        out = scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scaling)
    return out.reshape(g, heads, rows, v.shape[3])
