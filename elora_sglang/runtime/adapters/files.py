"""Read an adapter from disk or from bytes, and name its version by its content.

Everything is read into memory once, then checked, hashed and used from that memory: a file that is
replaced between two reads can never make the checked, the hashed and the served bytes differ.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
ADDED_TOKENS_FILE = "added_tokens.json"

#: A safetensors header larger than this is a corrupt length, not a header (the format's own limit).
MAX_HEADER_BYTES = 100_000_000

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

#: Config fields that change what an adapter computes; all others are refused or implied by the tensors.
_IDENTITY_FIELDS = ("alpha_pattern", "lora_alpha", "r", "rank_pattern", "use_rslora")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class AdapterError(ValueError):
    """An adapter that cannot be served. One line: which file, what is wrong, what to do.

    Attributes:
        file, fault, advice: the three parts of the message.
        status_code: HTTP status for APIs that ask the exception.
    """

    status_code = 400

    def __init__(self, file: str | Path, fault: str, advice: str) -> None:
        self.file, self.fault, self.advice = str(file), fault, advice
        super().__init__(" ".join(f"Adapter refused: {file}: {fault}. {advice}".split()))


@dataclass(frozen=True)
class AdapterFiles:
    """One adapter, read and not yet checked against a base model.

    Attributes:
        config_file, weights_file: where the two parts came from, for messages.
        config: ``adapter_config.json`` as parsed.
        tensors: name -> CPU tensor, dtypes as stored.
        added_tokens: ``added_tokens.json`` (token -> id), empty when absent.
    """

    config_file: str
    weights_file: str
    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    added_tokens: dict[str, int] = field(default_factory=dict)

    def version(self) -> str:
        """Content hash (64 hex digits): config fields that matter and every tensor's name, dtype, shape
        and bytes. Independent of path, name, file dates and of the order of the tensors."""
        digest = hashlib.sha256()
        identity = {name: self.config.get(name) for name in _IDENTITY_FIELDS}
        digest.update(json.dumps(identity, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def read_folder(path: str | Path) -> AdapterFiles:
    """Read a PEFT adapter folder completely.

    Raises:
        AdapterError: missing folder or file, unreadable JSON, corrupt safetensors, or pickled weights.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "no such folder"
        raise AdapterError(folder, what, f"Give the folder that holds {CONFIG_FILE} and {WEIGHTS_FILE}.")
    config_file, weights_file = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    config = _read_json(config_file, required=True)
    if not weights_file.exists() and (folder / PICKLE_FILE).exists():
        raise AdapterError(
            folder / PICKLE_FILE,
            "pickled weights are not loaded, a pickle can run code",
            f"Save the adapter again as {WEIGHTS_FILE} (peft: save_pretrained(safe_serialization=True)).",
        )
    tensors = parse_safetensors(_read_bytes(weights_file), str(weights_file))
    added = _read_json(folder / ADDED_TOKENS_FILE, required=False)
    return AdapterFiles(str(config_file), str(weights_file), config, tensors, added)


def resolve_path(path: str) -> str:
    """The local folder of ``path``: itself, or the download of a Hugging Face ``owner/name``.

    Raises:
        AdapterError: the repository cannot be fetched.
    """
    if Path(path).expanduser().exists() or not _HUB_ID.fullmatch(path):
        return path
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub client raises many unrelated types: offline, auth, not found
        raise AdapterError(
            path,
            f"no such folder, and not fetched from the Hugging Face hub ({type(error).__name__})",
            "Give a local folder, or check the repository's name and the network.",
        ) from error


def parse_safetensors(data: bytearray, where: str) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file held in memory; they share ``data``'s memory where alignment allows.

    Format: 8-byte little-endian header length, JSON header, data
    (https://huggingface.co/docs/safetensors, "Format").

    Raises:
        AdapterError: truncated or corrupt, or a dtype that is not a plain float.
    """
    advice = "Copy or download the file again."
    if len(data) < 8:
        raise AdapterError(where, f"truncated safetensors, {len(data)} bytes are no header", advice)
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise AdapterError(where, f"not a safetensors file, its header claims {length} bytes", advice)
    if 8 + length > len(data):
        fault = f"truncated safetensors, the header needs {8 + length} bytes and the file has {len(data)}"
        raise AdapterError(where, fault, advice)
    try:
        header = json.loads(data[8 : 8 + length])
    except (UnicodeDecodeError, ValueError) as error:
        raise AdapterError(where, "corrupt safetensors, its header is not JSON", advice) from error
    if not isinstance(header, dict):
        raise AdapterError(where, "corrupt safetensors, its header is not a JSON object", advice)
    header.pop("__metadata__", None)
    body = 8 + length
    tensors: dict[str, torch.Tensor] = {}
    expected_end = 0
    for name, entry in sorted(header.items(), key=_entry_start):
        dtype, shape, start, end = _entry(name, entry, where, advice)
        if start != expected_end or end - start != prod(shape) * dtype.itemsize:
            raise AdapterError(
                where, f"corrupt safetensors, offsets of {name!r} do not fit its shape", advice
            )
        if body + end > len(data):
            fault = f"truncated safetensors, {name!r} ends at byte {body + end} of {len(data)}"
            raise AdapterError(where, fault, advice)
        tensors[name] = _tensor(data, body + start, dtype, shape)
        expected_end = end
    if body + expected_end != len(data):
        extra = len(data) - body - expected_end
        raise AdapterError(where, f"corrupt safetensors, {extra} bytes belong to no tensor", advice)
    return tensors


def _entry_start(item: tuple[str, Any]) -> tuple[int, str]:
    name, entry = item
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    first = offsets[0] if isinstance(offsets, list) and offsets else 0
    return (first if isinstance(first, int) else 0, name)


def _entry(name: str, entry: Any, where: str, advice: str) -> tuple[torch.dtype, list[int], int, int]:
    try:
        code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
            raise TypeError("sizes must be non-negative integers")
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(
            where, f"corrupt safetensors, the entry of {name!r} is malformed", advice
        ) from error
    dtype = _DTYPES.get(code)
    if dtype is None:
        raise AdapterError(
            where,
            f"tensor {name!r} has dtype {code}, LoRA weights must be one of {', '.join(_DTYPES)}",
            "Save the adapter in a plain floating-point dtype.",
        )
    return dtype, shape, start, end


def _tensor(data: bytearray, offset: int, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    count = prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    if offset % dtype.itemsize:  # legal in the format; some kernels do not like unaligned memory
        data, offset = data[offset : offset + count * dtype.itemsize], 0
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).reshape(shape)


def _read_bytes(file: Path) -> bytearray:
    try:
        return bytearray(file.read_bytes())
    except OSError as error:
        fault = (
            "file is missing"
            if isinstance(error, FileNotFoundError)
            else f"cannot be read ({error.strerror})"
        )
        raise AdapterError(file, fault, "Save the adapter again, for example with peft.") from error


def _read_json(file: Path, *, required: bool) -> dict[str, Any]:
    if not required and not file.exists():
        return {}
    try:
        parsed = json.loads(_read_bytes(file))
    except (UnicodeDecodeError, ValueError) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(file, "is not valid JSON", "Save the adapter again, or mend the file.") from error
    if not isinstance(parsed, dict):
        raise AdapterError(file, "is not a JSON object", "Save the adapter again, or mend the file.")
    return parsed
