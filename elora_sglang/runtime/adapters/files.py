"""Read an adapter from disk or from bytes, and name its version by its content.

Everything is read into memory once, then checked, hashed and used from that memory: a file that is
replaced between two reads can never make the checked, the hashed and the served bytes differ.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
ADDED_TOKENS_FILE = "added_tokens.json"

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


def parse_safetensors(data: bytes | bytearray, where: str) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file held in memory; each has memory of its own.

    The library copies the tensors out of ``data``. That costs 20 ms for an adapter of 168 MB, beside 140 ms for reading
    it and 220 ms for its hash; views of ``data`` would save it and were not worth a parser of our own.

    Raises:
        AdapterError: truncated or corrupt, or a dtype that is not a plain float.
    """
    try:
        entries = safetensors.deserialize(bytes(data))
    except safetensors.SafetensorError as error:
        raise AdapterError(
            where, _safetensors_fault(data, str(error)), "Copy or download the file again."
        ) from error
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in entries:
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise AdapterError(
                where,
                f"tensor {name!r} has dtype {entry['dtype']}, LoRA weights must be one of {', '.join(_DTYPES)}",
                "Save the adapter in a plain floating-point dtype.",
            )
        stored, shape = entry["data"], entry["shape"]
        tensors[name] = (
            torch.frombuffer(stored, dtype=dtype).view(shape) if stored else torch.empty(shape, dtype=dtype)
        )
    return tensors


def _safetensors_fault(data: bytes | bytearray, said: str) -> str:
    """What is wrong, from what the library said; it has one sentence for a file that is too short and too long."""
    length = int.from_bytes(data[:8], "little")
    if "header too small" in said:
        return f"truncated safetensors, {len(data)} bytes are no header"
    if "header too large" in said:
        return f"not a safetensors file, its header claims {length} bytes"
    if "invalid header length" in said:
        return f"truncated safetensors, the header needs {8 + length} bytes and the file has {len(data)}"
    if "not fully covered" in said:
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        end, name = max(((entry["data_offsets"][1], name) for name, entry in header.items()), default=(0, ""))
        missing = 8 + length + end - len(data)
        if missing > 0:
            return f"truncated safetensors, {name!r} ends at byte {8 + length + end} of {len(data)}"
        return f"corrupt safetensors, {-missing} bytes belong to no tensor"
    return f"corrupt safetensors, {said.removeprefix('Error while deserializing: ')}"


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
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
