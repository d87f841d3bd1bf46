"""Versions follow content only; safetensors are read exactly; tensors are decoded, code is not."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from support.adapter_folders import Q_A, WEIGHTS_FILE, set_config, write_adapter

from elora_sglang.runtime.adapters.files import AdapterError, parse_safetensors, read_folder, resolve_path
from elora_sglang.runtime.adapters.tensors import decode, encode, from_tensors, verify_checksums


def version(folder: Path) -> str:
    return read_folder(folder).version()


def test_version_ignores_path_name_dates_order_and_notes(tmp_path: Path) -> None:
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two")
    tensors = load_file(two / WEIGHTS_FILE)
    save_file(dict(reversed(tensors.items())), two / WEIGHTS_FILE, metadata={"note": "other"})
    set_config(task_type="CAUSAL_LM", revision="x")(two)
    assert version(one) == version(two)
    again = from_tensors(tensors, json.loads((one / "adapter_config.json").read_text()), None)
    assert again.version() == version(one)


def test_version_sees_every_change_even_with_the_same_size_and_date(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    file = folder / WEIGHTS_FILE
    before, stat = version(folder), file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size and version(folder) != before
    data[-1] ^= 1
    file.write_bytes(data)
    assert version(folder) == before
    for change in ({"lora_alpha": 9}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}):
        other = write_adapter(tmp_path / "other")
        set_config(**change)(other)
        assert version(other) != before


def test_version_sees_names_dtypes_and_shapes() -> None:
    def of(name: str, tensor: torch.Tensor) -> str:
        return from_tensors({name: tensor}, {"r": 1}, None).version()

    zeros = torch.zeros(2, 3)
    versions = [
        of("a", zeros),
        of("b", zeros),
        of("a", zeros.T.contiguous()),
        of("a", torch.zeros(2, 3, dtype=torch.float64)),
        of("a", torch.zeros(3, 4, dtype=torch.float16)),
        of("a", torch.zeros(3, 4, dtype=torch.bfloat16)),
    ]
    assert len(set(versions)) == len(versions)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_parsing_equals_the_safetensors_library(dtype: torch.dtype) -> None:
    tensors = {
        "x": torch.randn(3, 5).to(dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "one": torch.ones(1).to(dtype),
    }
    parsed = parse_safetensors(bytearray(save(tensors)), "memory")
    assert parsed.keys() == tensors.keys()
    assert all(
        torch.equal(parsed[name], tensor) and parsed[name].dtype == dtype for name, tensor in tensors.items()
    )


def test_unaligned_data_is_read() -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (3 - len(header) % 4)
    assert len(header) % 4 == 3
    body = torch.tensor([1.5, -2.5]).numpy().tobytes()
    data = bytearray(len(header).to_bytes(8, "little") + header + body)
    assert parse_safetensors(data, "memory")["x"].tolist() == [1.5, -2.5]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [2]}, "missing field `data_offsets`"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "invalid value: integer `-2`"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "invalid shape, data type, or offset"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "invalid offset for tensor `x`"),
        ("text", "invalid type: string"),
    ],
)
def test_malformed_entries(entry: Any, words: str) -> None:
    header = json.dumps({"x": entry}).encode()
    with pytest.raises(AdapterError, match=words):
        parse_safetensors(bytearray(len(header).to_bytes(8, "little") + header + bytes(12)), "memory")


def test_hub_names_are_only_fetched_when_they_look_like_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    for path in (str(tmp_path), "/absent/folder", "absent"):
        assert resolve_path(path) == path
    with pytest.raises(AdapterError, match="not fetched from the Hugging Face hub"):
        resolve_path("owner/adapter")


# -- tensors in a request -------------------------------------------------------------------------

TENSORS = {Q_A: torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)}


def same(decoded: dict[str, torch.Tensor]) -> bool:
    return decoded.keys() == TENSORS.keys() and all(torch.equal(decoded[n], t) for n, t in TENSORS.items())


def torch_saved() -> bytes:
    sink = io.BytesIO()
    torch.save(TENSORS, sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    "payload", [save(TENSORS), torch_saved(), pickle.dumps(TENSORS)], ids=["st", "torch", "pickle"]
)
def test_every_documented_payload_over_http(payload: bytes) -> None:
    assert same(decode([payload, b"the other ranks' copies are not read"], same_process=False))


def test_header_lengths_that_look_like_a_pickle() -> None:
    for extra in range(300):
        data = save({"x": torch.ones(1)}, metadata={"pad": "p" * extra})
        if data[0] == 0x80:
            assert decode([data], same_process=False)["x"].tolist() == [1.0]
            return
    pytest.fail("no header length hit 0x80: the test lost its case")


class _Runs:
    def __reduce__(self) -> Any:
        return (os.system, ("touch elora-was-here",))


class _ReadsFile:
    def __reduce__(self) -> Any:
        return (open, ("/etc/hostname",))


def test_nothing_but_tensors_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for bomb in (_Runs(), {"x": _Runs()}, _ReadsFile(), {"x": subprocess.Popen}, {"x": sys.exit}):
        for same_process in (False, True):
            with pytest.raises(AdapterError, match=r"only tensors are unpickled|not a dict"):
                decode([pickle.dumps(bomb)], same_process=same_process)
    assert not list(tmp_path.iterdir())
    inner = io.BytesIO()
    torch.save({"x": _Runs()}, inner)
    with pytest.raises(AdapterError, match="cannot be unpickled"):
        decode([inner.getvalue()], same_process=False)
    assert not list(tmp_path.iterdir())


def test_handles_of_another_process_are_refused_over_http_only() -> None:
    from sglang.srt.utils import MultiprocessingSerializer

    with pytest.raises(AdapterError, match="handles of another process"):
        decode([MultiprocessingSerializer.serialize(copy.deepcopy(TENSORS))], same_process=False)
    assert same(decode([MultiprocessingSerializer.serialize(copy.deepcopy(TENSORS))], same_process=True))


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "truncated"),
        (b"\x80\x04garbage", "cannot be unpickled"),
        (pickle.dumps([1]), "not a dict"),
        (pickle.dumps({"x": 1}), "not a dict"),
        (pickle.dumps({"x": torch.ones(2).to(torch.float16).to_sparse()}), "only tensors|cannot"),
        (base64.b64encode(b"not an adapter at all"), "not a safetensors file|truncated"),
    ],
)
def test_broken_payloads(payload: bytes, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        decode([payload], same_process=False)
    with pytest.raises(AdapterError, match="is empty"):
        decode([], same_process=False)


def test_what_the_schedulers_get_is_plain_safetensors() -> None:
    payloads = encode(TENSORS, tp_size=2)
    assert len(payloads) == 2 and same(parse_safetensors(bytearray(payloads[1]), "memory"))


def test_checksums() -> None:
    sums = {
        n: hashlib.sha256(t.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
        for n, t in TENSORS.items()
    }
    verify_checksums(TENSORS, None)
    verify_checksums(TENSORS, sums)
    for wrong, words in (
        ({**sums, "half": "0" * 64}, "does not match"),
        ({Q_A: sums[Q_A]}, "has no expected checksum"),
        ({**sums, "more": "0"}, "was not sent"),
    ):
        with pytest.raises(AdapterError, match=words):
            verify_checksums(TENSORS, wrong)
