"""Out-of-tree SGLang platform that lets the released wheel serve on any CPU.

Entry point ``elora_cpu`` of the group ``sglang.srt.platforms``. It is off where an accelerator is available and
where the user chose SGLang's own CPU engine; stock SGLang and ``--elora`` are served alike. SGLang imports it in every
process, so it steps aside, with one line, where another SGLang is installed than it was written for.
"""

from __future__ import annotations

import importlib
import logging
import os
from importlib import metadata

logger = logging.getLogger(__name__)

PLATFORM_CLASS = "elora_sglang.platform.cpu.EloraCpuPlatform"
#: Imported before the platform is offered: all that it needs to be made.
NEEDS = (
    "elora_sglang.platform.cpu",
    "sglang.srt.arg_groups.choices",
    "sglang.srt.arg_groups.resolution_hooks",
)


def activate() -> str | None:
    """Dotted name of the platform class, or None where this platform has no business.

    Called by SGLang in every process, once; starts no device. Logs one line where it steps aside. Never raises.
    """
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1" or _accelerator_available():
        return None
    problem = _misfit()
    if problem is not None:
        logger.warning("elora: the CPU platform is off: %s", problem)
        return None
    return PLATFORM_CLASS


def _misfit() -> str | None:
    """Why the platform does not fit the installed SGLang; None when it does."""
    from packaging.specifiers import SpecifierSet

    from elora_sglang.patches.base import SUPPORTED_SGLANG

    try:
        version = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "SGLang is not installed as a package, so its version is not known"
    if not SpecifierSet(SUPPORTED_SGLANG).contains(version, prereleases=True):
        return f"it was written for SGLang {SUPPORTED_SGLANG}, installed is {version}"
    try:
        for module in NEEDS:
            importlib.import_module(module)
    except Exception as error:  # whatever an unknown SGLang does while it is imported must not end its import
        return f"SGLang {version} lacks what it needs: {type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _accelerator_available() -> bool:
    import torch

    if torch.cuda.is_available():
        return True
    for name in ("xpu", "npu", "musa", "mps", "hpu"):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_available():
            return True
    return False
