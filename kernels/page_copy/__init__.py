"""Copying the rows of slots between two pools, on one device or between a GPU and pinned host memory.

``copy_rows(source, target, source_slots, target_slots, layers)`` copies, for each of the layers and both streams (K and
V), the row of ``source_slots[i]`` to the row of ``target_slots[i]``:

* ``source``, ``target``: :class:`Rows`, per layer and stream ``[slots, row bytes]``, rows of equal size on both sides
* slots: int32 ``[n]`` on the device that copies; no target slot twice
* ``layers``: those to copy, all of them or one

``reference`` is plain PyTorch. ``triton_kernel`` moves all of it in one launch, reading or writing pinned host memory
directly, so scattered slots need no staging copy on either side.
"""

from __future__ import annotations

from elora_sglang.kernels.page_copy.reference import copy_rows
from elora_sglang.kernels.page_copy.rows import Rows

__all__ = ["Rows", "copy_rows"]
