"""The header of a safetensors file, read without touching a tensor and without trusting a byte of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from artifacts.errors import FileBroken
from artifacts.json_objects import unique_members

MAX_HEADER_BYTES = 10 * 1024 * 1024
"""An adapter of thousands of modules needs well under 1 MB; the format itself would allow 100 MB."""

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""The dtypes that an adapter may hold, with the bytes of one element."""

MAX_BASE_HEADER_BYTES = 100 * 1024 * 1024
"""The format's own limit, for base models: mixtures of experts have a hundred thousand tensors."""

BASE_DTYPE_BYTES: Mapping[str, int] = {
    **DTYPE_BYTES,
    "U16": 2,
    "U32": 4,
    "U64": 8,
    "C64": 8,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
}
"""What the weights of a base model may be made of; quantised ones use more than adapters do."""

MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `begin` and `end` are absolute byte offsets in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """All tensors in order of their offsets, and the file's string metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int


def looks_like_safetensors(start: bytes) -> bool:
    """Whether a file that begins with these (at least nine) bytes can be one: a header length, then a brace.

    It is asked before other magic numbers, since a header of 1152 bytes begins like a pickle and one of 559903 bytes
    like a gzip stream.
    """
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES


def packed_header(document: Mapping[str, Any]) -> bytes:
    """The beginning of a file: the length, and the header as JSON, padded so that tensors are aligned."""
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(
    path: Path,
    *,
    dtypes: Mapping[str, int] = DTYPE_BYTES,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> SafetensorsHeader:
    """Read and check the header of the file at `path`.

    Raises:
        FileBroken: truncated file, header over `max_header_bytes`, invalid JSON or duplicate keys, a dtype that
            is not in `dtypes`, a shape that does not fit its bytes, or offsets that overlap, leave a gap,
            run past the end or stop before it.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        return parse_header(file, size, name=path.name, dtypes=dtypes, max_header_bytes=max_header_bytes)


def parse_header(
    file: BinaryIO,
    file_size: int,
    *,
    name: str,
    dtypes: Mapping[str, int] = DTYPE_BYTES,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> SafetensorsHeader:
    """As `read_header`, from a file object at its start."""
    prefix = file.read(8)
    if len(prefix) < 8:
        raise FileBroken(f"{name}: truncated: {file_size} bytes, a safetensors file has at least 8.")
    length = int.from_bytes(prefix, "little")
    if length > max_header_bytes:
        raise FileBroken(
            f"{name}: the header claims {length} bytes; at most {max_header_bytes} are accepted.",
            hint="Is this a safetensors file? Its first eight bytes are the little-endian length of a JSON header.",
        )
    raw = file.read(length)
    if len(raw) < length:
        raise FileBroken(f"{name}: truncated inside the header: {len(raw)} of {length} bytes are there.")
    document = _parse_json(raw, name)
    metadata = _metadata(document.pop("__metadata__", {}), name)
    data_start = 8 + length
    tensors = [_tensor(key, entry, data_start, name, dtypes) for key, entry in document.items()]
    tensors.sort(key=lambda info: (info.begin, info.end))
    _check_contiguous(tensors, data_start, file_size, name)
    return SafetensorsHeader({info.name: info for info in tensors}, metadata, data_start, file_size)


def _parse_json(raw: bytes, name: str) -> dict[str, Any]:
    def twice(key: str) -> FileBroken:
        return FileBroken(f"{name}: the header names {key[:80]!r} twice.")

    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_members(twice))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FileBroken(f"{name}: the header is not valid JSON: {error}.") from error
    if not isinstance(document, dict):
        raise FileBroken(f"{name}: the header is a JSON {type(document).__name__}, not an object.")
    return document


def _metadata(value: Any, name: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise FileBroken(f"{name}: __metadata__ must map strings to strings.")
    return value


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(key: str, entry: Any, data_start: int, name: str, dtypes: Mapping[str, int]) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileBroken(f"{name}: the header entry of {key!r} needs exactly dtype, shape and data_offsets.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise FileBroken(f"{name}: {key!r} has dtype {str(dtype)[:40]!r}; accepted are {', '.join(dtypes)}.")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise FileBroken(f"{name}: {key!r} has an invalid shape {str(shape)[:80]}.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise FileBroken(f"{name}: {key!r} has invalid data_offsets {str(offsets)[:80]}.")
    needed = math.prod(shape) * dtypes[dtype]
    begin, end = offsets
    if end - begin != needed:
        raise FileBroken(
            f"{name}: {key!r} of shape {shape} and dtype {dtype} needs {needed} bytes, "
            f"its offsets {offsets} give {end - begin}."
        )
    return TensorInfo(key, dtype, tuple(shape), data_start + begin, data_start + end)


def _check_contiguous(tensors: list[TensorInfo], data_start: int, file_size: int, name: str) -> None:
    position = data_start
    for info in tensors:
        if info.begin != position:
            fault = "overlaps the tensor before it" if info.begin < position else "leaves a gap before it"
            raise FileBroken(f"{name}: {info.name!r} at byte {info.begin - data_start} {fault}.")
        position = info.end
    if position > file_size:
        raise FileBroken(f"{name}: truncated: the header describes {position} bytes, the file has {file_size}.")
    if position < file_size:
        raise FileBroken(f"{name}: {file_size - position} bytes follow the last tensor.")
