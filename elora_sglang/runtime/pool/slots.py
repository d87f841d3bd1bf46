"""Slot tensors as payloads of the dependency tree: split, slice, join.

A payload is a one-dimensional int64 tensor of pool slots in token order (an adapter's: in the order of its
pages). Payloads are never written to after they were handed to the tree.
"""

from __future__ import annotations

import torch


class SlotPayloads:
    """The tree's payload operations on slot tensors (see ``elora_sglang.core.tree.payloads.PayloadOps``).

    Results own their memory: a view would keep the whole request's row alive for as long as one page of it is
    cached.
    """

    __slots__ = ()

    def slice(self, payload: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Slots of tokens ``[start, stop)``, shape ``[stop - start]``; a copy on the same device."""
        return payload.narrow_copy(0, start, stop - start)

    def split(self, payload: torch.Tensor, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of tokens ``[0, at)`` and ``[at, size)``; copies on the same device."""
        return payload.narrow_copy(0, 0, at), payload.narrow_copy(0, at, len(payload) - at)

    def join(self, payloads: list[torch.Tensor]) -> torch.Tensor:
        """All slots in order, shape ``[sum of sizes]``. One alone comes back as it is, none is an error."""
        return payloads[0] if len(payloads) == 1 else torch.cat(payloads)
