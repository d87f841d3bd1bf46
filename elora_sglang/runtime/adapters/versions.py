"""A version's name: SGLang's ``lora_id`` of an adapter, made of its content and of the load that brought it."""

from __future__ import annotations

#: Hex digits of the content hash in a ``lora_id``.
HASH_DIGITS = 32


def version_id(version: str, load_number: int) -> str:
    """``lora_id`` of a version: content hash (``AdapterFiles.version``) and number of the load."""
    return f"{version[:HASH_DIGITS]}-{load_number}"


def is_version(lora_id: str, version: str) -> bool:
    """Whether ``lora_id`` names this content."""
    return lora_id.rpartition("-")[0] == version[:HASH_DIGITS]
