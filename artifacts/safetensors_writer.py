"""A safetensors file written tensor by tensor, in any order, without holding the others in memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from artifacts.adapter import TORCH_DTYPES
from artifacts.errors import DiskFull
from artifacts.safetensors_header import BASE_DTYPE_BYTES, packed_header


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor to come: name, safetensors dtype (such as "BF16") and shape. Of an adapter or of a base model."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        elements = 1
        for dimension in self.shape:
            elements *= dimension
        return elements * BASE_DTYPE_BYTES[self.dtype]


class SafetensorsWriter:
    """Context manager that writes `path` and makes it appear only when every tensor is there.

    The space is reserved at once, so that a full disk is found before the work is done.

    Raises:
        DiskFull: when the space can not be had.
        ValueError: a tensor that was not announced, that differs from its entry, or that is missing at the end.
    """

    def __init__(self, path: Path, entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._entries = {entry.name: entry for entry in entries}
        if len(self._entries) != len(entries):
            raise ValueError("two tensors have the same name")
        self._missing = set(self._entries)
        header, self._offsets, self._size = _layout(entries, metadata)
        self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _reserve(self._descriptor, self._size, path)
            _write_all(self._descriptor, memoryview(header), 0, path)
        except BaseException:
            self._abandon()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one tensor; safe to call from several threads at once."""
        entry = self._entries[name]
        if tuple(tensor.shape) != entry.shape or tensor.dtype != TORCH_DTYPES[entry.dtype]:
            raise ValueError(f"{name}: {tensor.dtype}{tuple(tensor.shape)} was announced as {entry.dtype}{entry.shape}")
        if entry.size:
            data = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
            _write_all(self._descriptor, data.data, self._offsets[name], self._path)
        self._missing.discard(name)

    def write_part(self, name: str, offset: int, data: memoryview) -> None:
        """Store bytes of one tensor from byte `offset` of it on; the parts of a tensor come in order."""
        entry = self._entries[name]
        if offset + data.nbytes > entry.size:
            raise ValueError(
                f"{name}: {offset} + {data.nbytes} bytes are more than the {entry.size} that were announced"
            )
        end = offset + data.nbytes
        _write_all(self._descriptor, data, self._offsets[name] + offset, self._path)
        if end == entry.size:
            self._missing.discard(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._abandon()
            return
        if self._missing:
            self._abandon()
            raise ValueError(f"{len(self._missing)} tensors were never written, the first is {min(self._missing)}")
        os.close(self._descriptor)
        self._partial.replace(self._path)

    def _abandon(self) -> None:
        os.close(self._descriptor)
        self._partial.unlink(missing_ok=True)


def _layout(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, absolute offset of each tensor, and the size of the file."""
    # Wider elements first keeps every tensor aligned to its own element size.
    ordered = sorted(entries, key=lambda entry: (-BASE_DTYPE_BYTES[entry.dtype], entry.name))
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    relative, position = {}, 0
    for entry in ordered:
        relative[entry.name] = position
        document[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.size],
        }
        position += entry.size
    header = packed_header(document)
    start = len(header)
    return header, {name: start + offset for name, offset in relative.items()}, start + position


def _reserve(descriptor: int, size: int, path: Path) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _disk_full(path, size) from error
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, size)


def _write_all(descriptor: int, data: memoryview, offset: int, path: Path) -> None:
    try:
        while data:
            written = os.pwrite(descriptor, data, offset)
            data, offset = data[written:], offset + written
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _disk_full(path, len(data)) from error
        raise


def _disk_full(path: Path, size: int) -> DiskFull:
    return DiskFull(f"There is no space for {path.name} ({size} bytes).", hint="Free space in the data directory.")
