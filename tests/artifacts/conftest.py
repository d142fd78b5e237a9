"""Files of the tests: a writer of safetensors that promises nothing, and adapters in PEFT's layout."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
BYTES |= {"U8": 1, "BOOL": 1}

Tensors = Mapping[str, tuple[str, Sequence[int]]]


def _content(name: str, size: int) -> bytes:
    """Bytes below 0x3c, so that every float made of them is small and finite; different per name."""
    block = bytes(byte % 0x3C for byte in hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest())
    return (block * (size // len(block) + 1))[:size]


def _write(
    path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None, data: Mapping[str, bytes] | None = None
) -> Path:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    body = bytearray()
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(body), len(body) + size]}
        body += (data or {}).get(name) or _content(name, size)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)
    return path


def _pairs(
    *modules: str, rank: int = 4, d_in: int = 8, d_out: int = 6, dtype: str = "F32", prefix: str = "base_model.model."
) -> dict[str, tuple[str, list[int]]]:
    tensors: dict[str, tuple[str, list[int]]] = {}
    for module in modules:
        tensors[f"{prefix}{module}.lora_A.weight"] = (dtype, [rank, d_in])
        tensors[f"{prefix}{module}.lora_B.weight"] = (dtype, [d_out, rank])
    return tensors


@pytest.fixture
def write_tensors() -> Callable[..., Path]:
    """write_tensors(path, {name: (dtype, shape)}, metadata=None, data={name: bytes}) → path."""
    return _write


@pytest.fixture
def pairs() -> Callable[..., dict[str, tuple[str, list[int]]]]:
    """pairs("model.q_proj", …, rank=4, d_in=8, d_out=6) → the tensors of a LoRA in PEFT's names."""
    return _pairs


@pytest.fixture
def lora_config() -> Callable[..., dict[str, Any]]:
    """lora_config(r=…, …) → the smallest adapter_config.json of a LoRA."""

    def make(**fields: Any) -> dict[str, Any]:
        base = {
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "base_model_name_or_path": "someone/base",
        }
        return base | fields

    return make


@pytest.fixture
def peft_directory(tmp_path: Path, lora_config: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """peft_directory(tensors, data=None, **fields of the configuration) → a PEFT directory."""

    def make(
        tensors: Tensors, *, data: Mapping[str, bytes] | None = None, name: str = "adapter", **fields: Any
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        _write(directory / "adapter_model.safetensors", tensors, {"format": "pt"}, data)
        (directory / "adapter_config.json").write_text(json.dumps(lora_config(**fields)))
        return directory

    return make
