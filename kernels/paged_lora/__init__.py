"""Multi-adapter LoRA on weights that lie in pages of the KV pool.

One call handles one linear module of one layer for a whole batch of mixed adapters and LoRA ranks::

    out[t] += scaling(t) * B(t) @ (A(t) @ x[t])        for every row t of an active segment

Shapes (T rows in the batch, one module on one tp rank):

* ``x``    ``[T, in_features]``, activation dtype
* ``out``  ``[T, out_features]``, activation dtype, changed in place
* ``h``    ``[T, R]``, R = the largest number of stacked LoRA-rank rows among the batch's adapters
* A        ``[rank_rows, in_features]``; B of one slice ``[rank, width]`` (rank-major, see
  docs/byte-layout.md), anything from rank 1 up, no padding between adapters

Rows outside the active segments (base model, LoRA rank 0, padding) are left as they are.

``add_lora`` is the fused form. ``shrink`` and ``expand`` are its halves, for row-parallel modules:
their A is sharded along the input, so ``h`` must be all-reduced in between.

``adapter`` in a :class:`Segment` is anything with ``module(layer, name)`` (the runtime's
``PackedAdapter``); this folder knows torch only. ``reference`` is plain PyTorch, vectorised by segment.
"""

from __future__ import annotations

from elora_sglang.kernels.paged_lora.reference import add_lora, expand, shrink
from elora_sglang.kernels.paged_lora.segments import Segment, SegmentBatch, plan_segments

__all__ = ["Segment", "SegmentBatch", "add_lora", "expand", "plan_segments", "shrink"]
