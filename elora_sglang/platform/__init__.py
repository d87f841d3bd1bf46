"""Out-of-tree SGLang platform that lets the released wheel serve on any CPU.

Entry point ``elora_cpu`` of the group ``sglang.srt.platforms``. It is off where an accelerator is available and
where the user chose SGLang's own CPU engine; stock SGLang and ``--elora`` are served alike.
"""

from __future__ import annotations

import os

PLATFORM_CLASS = "elora_sglang.platform.cpu.EloraCpuPlatform"


def activate() -> str | None:
    """Dotted name of the platform class, or None where this platform has no business.

    Called by SGLang in every process; imports torch only, and starts no device.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or _accelerator_available():
        return None
    return PLATFORM_CLASS


def _accelerator_available() -> bool:
    import torch

    if torch.cuda.is_available():
        return True
    for name in ("xpu", "npu", "musa", "mps", "hpu"):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_available():
            return True
    return False
