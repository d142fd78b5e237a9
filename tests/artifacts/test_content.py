from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from artifacts import content
from artifacts.content import count_nonfinite, file_sha256, identity_digest, scan, tensor_digests, weights_digest
from artifacts.errors import FileBroken
from artifacts.layout import read_layout
from artifacts.safetensors_header import read_header

Make = Callable[..., Any]
NAN, INF = float("nan"), float("inf")


def bfloat16(*values: float) -> bytes:
    return b"".join(struct.pack("<f", value)[2:] for value in values)


PACKED = {
    "F64": struct.pack("<4d", 1.0, NAN, -INF, 5e-324),
    "F32": struct.pack("<4f", 1.0, NAN, -INF, 1e-45),
    "F16": struct.pack("<4e", 1.0, NAN, -INF, 6e-8),
    "BF16": bfloat16(1.0, NAN, -INF, 1e-38),
    "F8_E5M2": bytes([0x3C, 0x7F, 0xFC, 0x01]),
    "F8_E4M3": bytes([0x38, 0x7F, 0xFF, 0x7E]),  # 0x7e is 448, the largest number
}


def test_sha256_of_the_file_and_digest_of_its_tensors(tmp_path: Path, write_tensors: Make, pairs: Make) -> None:
    path = write_tensors(tmp_path / "a.safetensors", pairs("m.q_proj"))
    found = scan(path, read_header(path))
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == file_sha256(path)
    lines = sorted(
        json.dumps([info.name, info.dtype, list(info.shape), digest], separators=(",", ":"))
        for info, digest in tensor_digests(path, read_header(path))
    )
    assert found.weights_digest == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (found.nonfinite, found.zero) == ({}, frozenset())


def test_a_copy_with_other_metadata_and_order_has_the_same_digest(
    tmp_path: Path, write_tensors: Make, pairs: Make
) -> None:
    tensors = pairs("m.q_proj", "m.v_proj")
    first = write_tensors(tmp_path / "a.safetensors", tensors)
    second = write_tensors(tmp_path / "b.safetensors", dict(reversed(tensors.items())), {"format": "pt"})
    assert file_sha256(first) != file_sha256(second)
    assert weights_digest(first, read_header(first)) == weights_digest(second, read_header(second))


@pytest.mark.parametrize("change", ["value", "name", "shape", "dtype"])
def test_whatever_differs_changes_the_digest(tmp_path: Path, write_tensors: Make, change: str) -> None:
    first = write_tensors(tmp_path / "a.safetensors", {"w": ("F16", [2, 4])}, data={"w": bytes(16)})
    name, dtype, shape, data = "w", "F16", [2, 4], bytearray(16)
    if change == "value":
        data[3] = 1
    elif change == "name":
        name = "v"
    elif change == "shape":
        shape = [4, 2]
    else:
        dtype = "BF16"
    second = write_tensors(tmp_path / "b.safetensors", {name: (dtype, shape)}, data={name: bytes(data)})
    assert weights_digest(first, read_header(first)) != weights_digest(second, read_header(second))


@pytest.mark.parametrize("dtype", PACKED)
def test_nan_and_inf_are_counted(tmp_path: Path, write_tensors: Make, dtype: str) -> None:
    tensors = {"bad": (dtype, [4]), "good": (dtype, [2])}
    good = PACKED[dtype][: len(PACKED[dtype]) // 4] * 2
    path = write_tensors(tmp_path / "a.safetensors", tensors, data={"bad": PACKED[dtype], "good": good})
    assert count_nonfinite(path, read_header(path)) == {"bad": 2}


@pytest.mark.parametrize("dtype", [*PACKED, "I64", "I8", "BOOL"])
def test_tensors_of_zeros_are_found(tmp_path: Path, write_tensors: Make, dtype: str) -> None:
    size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}.get(dtype, 1)
    negative = bytearray(4 * size)
    if dtype[0] != "I" and dtype != "BOOL":
        negative[-1] = 0x80  # −0.0
    data = {"zero": bytes(4 * size), "negative": bytes(negative), "one": bytes(4 * size - 1) + b"\1"}
    path = write_tensors(
        tmp_path / "a.safetensors", {name: (dtype, [4]) for name in data} | {"none": (dtype, [0])}, data=data
    )
    assert scan(path, read_header(path)).zero == {"zero", "negative"}


@pytest.mark.parametrize("buffer_bytes", [64, 4096])
def test_tensors_larger_than_the_buffers(
    tmp_path: Path, write_tensors: Make, monkeypatch: pytest.MonkeyPatch, buffer_bytes: int
) -> None:
    values = np.zeros(5000, np.float32)
    values[[0, 17, 1024, 4999]] = [NAN, INF, -INF, NAN]
    tensors = {"odd": ("U8", [13]), "w": ("F32", [5000])}  # the odd one puts all others off their alignment
    path = write_tensors(tmp_path / "a.safetensors", tensors, data={"w": values.tobytes()})
    header = read_header(path)
    expected = scan(path, header)
    monkeypatch.setattr(content, "BUFFER_BYTES", buffer_bytes)
    assert scan(path, header) == expected
    assert expected.nonfinite == {"w": 4}
    assert expected.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_file_that_became_shorter(tmp_path: Path, write_tensors: Make, pairs: Make) -> None:
    path = write_tensors(tmp_path / "a.safetensors", pairs("m.q_proj"))
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileBroken, match="became shorter"):
        scan(path, header)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path, size = tmp_path / "big.safetensors", 256 * 1024 * 1024
    raw = json.dumps({"w": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + size)
    header = read_header(path)
    process = psutil.Process()
    before = process.memory_info().rss
    assert scan(path, header).zero == {"w"}
    assert process.memory_info().rss - before < 32 * 1024 * 1024


def test_identity_follows_the_effect_of_the_configuration(peft_directory: Make, pairs: Make) -> None:
    def identity(name: str, weights: str = "w", **fields: Any) -> str:
        layout = read_layout(peft_directory(pairs("m.q_proj"), name=name, **fields))
        return identity_digest(weights, layout.configs, layout.modules)

    same = identity("a")
    assert same == identity("b", lora_dropout=0.5, base_model_name_or_path="other/base")
    assert same == identity("c", alpha_pattern={"q_proj": 8})
    assert same != identity("d", lora_alpha=16)
    assert same != identity("e", alpha_pattern={"q_proj": 4})
    assert same != identity("f", use_rslora=True)
    assert same != identity("g", fan_in_fan_out=True)
    assert same != identity("h", weights="other")
