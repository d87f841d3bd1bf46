"""Adapter tensors sent over HTTP or by ``Engine``: decode them without running anything they bring along.

Accepted payloads, one per tensor-parallel rank, all the same adapter (only the first is read):

* the bytes of a safetensors file (``safetensors.torch.save(tensors)``), the recommended form;
* ``torch.save`` of a dict of tensors, read with ``weights_only=True``;
* SGLang's ``MultiprocessingSerializer`` pickle of a dict of tensors, read by :class:`TensorUnpickler`.
  ``Engine`` sends those; their tensors are file handles, which only the same process may pass.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors.torch import save

from elora_sglang.runtime.adapters.files import AdapterError, AdapterFiles, parse_safetensors

#: Name that stands for the file in messages about a payload.
TENSORS = "serialized_named_tensors"

_SEND = "Send the bytes of safetensors.torch.save(tensors), base64-encoded over HTTP."

_STORAGES = tuple(f"{kind}Storage" for kind in ("BFloat16", "Double", "Float", "Half", "Untyped"))

#: Everything a pickled dict of CPU tensors with its bytes inside refers to.
_INLINE_GLOBALS = frozenset(
    {
        ("builtins", "dict"),
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch", "Tensor"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.storage", "TypedStorage"),
        ("torch.storage", "UntypedStorage"),
        *(("torch", name) for name in _STORAGES),
        *(("torch", name) for name in ("bfloat16", "float16", "float32", "float64")),
    }
)

#: What tensors passed as file handles refer to besides; only honest within one process tree.
_HANDLE_GLOBALS = frozenset(
    {
        ("multiprocessing.resource_sharer", "DupFd"),
        *(
            ("torch.multiprocessing.reductions", name)
            for name in (
                "rebuild_storage_empty",
                "rebuild_storage_fd",
                "rebuild_storage_filename",
                "rebuild_tensor",
                "rebuild_typed_storage",
            )
        ),
    }
)


class TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors and nothing else; any other global is refused before it is looked up.

    Args:
        data: the pickle.
        handles: whether tensors may be file handles of this process tree.
    """

    def __init__(self, data: bytes, *, handles: bool) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = _INLINE_GLOBALS | _HANDLE_GLOBALS if handles else _INLINE_GLOBALS

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage  # torch's own helper would unpickle anything
        if (module, name) in self._allowed:
            return super().find_class(module, name)
        if (module, name) in _HANDLE_GLOBALS or "cuda" in name.lower():
            raise AdapterError(TENSORS, "the tensors are handles of another process or device", _SEND)
        raise AdapterError(
            TENSORS, f"the payload asks for {module}.{name}, only tensors are unpickled", _SEND
        )


def _load_storage(data: bytes) -> Any:
    storage = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    if not isinstance(storage, (torch.storage.TypedStorage, torch.UntypedStorage)):
        raise AdapterError(TENSORS, "a tensor's storage holds something else", _SEND)
    return storage


def decode(payloads: Sequence[bytes], *, same_process: bool) -> dict[str, torch.Tensor]:
    """Name -> CPU tensor of the first payload; the tensors own their memory.

    Raises:
        AdapterError: no payload, not decodable, or anything in it but a dict of tensors.
    """
    if not payloads:
        raise AdapterError(TENSORS, "is empty", _SEND)
    data = payloads[0]
    tensors: Any
    if data[:2] == b"PK":
        tensors = _guarded(lambda: torch.load(io.BytesIO(data), weights_only=True, map_location="cpu"))
    elif data[:1] == b"\x80" and data[8:9] != b"{":  # a safetensors header can be 128 + 256 n bytes long
        tensors = _guarded(lambda: TensorUnpickler(data, handles=same_process).load())
    else:
        tensors = parse_safetensors(bytearray(data), TENSORS)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in tensors.items()
    ):
        raise AdapterError(TENSORS, "is not a dict from names to tensors", _SEND)
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.is_floating_point():
            fault = f"{name!r} is {tensor.dtype} on {tensor.device}, LoRA weights are dense floats on the CPU"
            raise AdapterError(TENSORS, fault, _SEND)
    return {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}


def _guarded(load: Callable[[], Any]) -> Any:
    try:
        return load()
    except AdapterError:
        raise
    except Exception as error:  # a broken or hostile pickle can fail in any way
        raise AdapterError(TENSORS, f"cannot be unpickled ({type(error).__name__})", _SEND) from error


def from_tensors(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], added_tokens: dict[str, int] | None
) -> AdapterFiles:
    """The adapter made of decoded tensors and a PEFT config, as if read from a folder."""
    return AdapterFiles("config_dict", TENSORS, config, tensors, added_tokens or {})


def encode(tensors: dict[str, torch.Tensor], tp_size: int) -> list[bytes]:
    """The payloads the scheduler processes get: plain safetensors bytes, one reference per rank."""
    return [save(tensors)] * tp_size


def verify_checksums(tensors: dict[str, torch.Tensor], expected: dict[str, str] | None) -> None:
    """Compare SHA-256 of each tensor's bytes with what the sender promised. Raises AdapterError.

    Args:
        expected: tensor name -> hex digest, for exactly the tensors sent; None checks nothing.
    """
    if expected is None:
        return
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            where = "was not sent" if name not in tensors else "has no expected checksum"
            raise AdapterError(TENSORS, f"{name!r} {where}", "Send the same names in both.")
        data = tensors[name].flatten().view(torch.uint8).numpy()
        if hashlib.sha256(data.data).hexdigest() != expected[name]:
            raise AdapterError(TENSORS, f"{name!r} does not match its expected checksum", "Send it again.")
