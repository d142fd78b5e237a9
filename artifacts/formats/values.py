"""The few numbers of a file that a reader looks at: scalars such as alpha, and whether a part of a matrix is zero."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Protocol

from artifacts.errors import FileBroken
from artifacts.safetensors_header import DTYPE_BYTES, TensorInfo

_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}


class Values(Protocol):
    """Access to the numbers behind a header."""

    def scalar(self, info: TensorInfo) -> float:
        """The number in a tensor of one element."""
        ...

    def zero_outside(self, info: TensorInfo, blocks: tuple[tuple[int, int, int, int], ...], probe: bool) -> bool:
        """Whether a matrix is zero outside of its blocks (row start, row stop, column start, column stop).

        With `probe` only the first row of each block is looked at.
        """
        ...


class FileValues:
    """The numbers of a file on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def scalar(self, info: TensorInfo) -> float:
        """Raises FileBroken: more or less than one element, or a dtype without a meaning here."""
        if info.elements != 1:
            raise FileBroken(f"{info.name!r} has shape {info.shape}; one number is expected.")
        raw = self._bytes(info.begin, info.end)
        if info.dtype == "BF16":
            return float(struct.unpack("<f", b"\0\0" + raw)[0])
        if info.dtype not in _FORMATS:
            raise FileBroken(f"{info.name!r} has dtype {info.dtype}, in which no scaling is stored.")
        return float(struct.unpack(_FORMATS[info.dtype], raw)[0])

    def zero_outside(self, info: TensorInfo, blocks: tuple[tuple[int, int, int, int], ...], probe: bool) -> bool:
        import numpy as np

        width, size = info.shape[1], DTYPE_BYTES[info.dtype]
        kind = f"<u{size}"
        sign = np.array((1 << (8 * size - 1)) - 1, dtype=kind)
        for start, stop, left, right in blocks:
            last = start + 1 if probe else stop
            raw = self._bytes(info.begin + start * width * size, info.begin + last * width * size)
            rows = np.frombuffer(raw, dtype=kind).reshape(last - start, width) & sign
            if rows[:, :left].any() or rows[:, right:].any():
                return False
        return True

    def _bytes(self, begin: int, end: int) -> bytes:
        with self._path.open("rb") as file:
            file.seek(begin)
            raw = file.read(end - begin)
        if len(raw) != end - begin:
            raise FileBroken("The file became shorter while it was read.")
        return raw
