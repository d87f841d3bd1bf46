"""Answers of a scheduler to the tokenizer process that SGLang has no type for."""

from __future__ import annotations

from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import LoRAUpdateOutput


class AdapterInUse(LoRAUpdateOutput):
    """An unload that has to be repeated: ``running`` requests still compute with the version.

    SGLang dispatches it as the :class:`LoRAUpdateOutput` that it is (``utils.py``, ``TypeBasedDispatcher``).
    """

    running: int = 0


def announce() -> None:
    """Let this process decode the types of this module. Mutates SGLang's decoder; idempotent."""
    io_struct.hook_custom_types(AdapterInUse)
