"""CRC-32 of blobs, which the zip format wants ahead of each entry; computed once, then kept by digest."""

from __future__ import annotations

import os
import tempfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from storage.blobs import BlobStore

_log = structlog.stdlib.get_logger(__name__)
_KEPT_IN_MEMORY = 4096


class Crc32Cache:
    """CRC-32 by SHA-256. What a blob holds never changes, so an entry is valid for ever and losing one costs a read.

    Args:
        blobs: where the bytes are.
        folder: one small file per blob; several servers may share it.
    """

    def __init__(self, blobs: BlobStore, folder: Path) -> None:
        self._blobs = blobs
        self._folder = folder
        self._memory: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, sha256: str) -> int:
        """The CRC-32 of a blob. Raises BlobMissing."""
        return self.made(sha256, lambda: self._blobs.stream(sha256))

    def made(self, sha256: str, content: Callable[[], Iterable[bytes]]) -> int:
        """The CRC-32 of what is made out of blobs, under a digest of how it is made; `content` gives its bytes."""
        with self._lock:
            if sha256 in self._memory:
                self._memory.move_to_end(sha256)
                return self._memory[sha256]
        value = self._read(sha256)
        if value is None:
            value = 0
            for chunk in content():
                value = zlib.crc32(chunk, value)
            self.put(sha256, value)
        else:
            self._remember(sha256, value)
        return value

    def put(self, sha256: str, value: int) -> None:
        """Keep a CRC-32 that is known already, e.g. from the upload."""
        self._remember(sha256, value)
        path = self._path(sha256)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".crc32-")
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{value:08x}")
            Path(temporary).replace(path)
        except OSError as error:
            # Costs the next process one read of the blob; not a reason to fail what was asked for.
            _log.warning("crc32_not_kept", sha256=sha256, error=str(error))

    def _path(self, sha256: str) -> Path:
        return self._folder / sha256[:2] / sha256

    def _read(self, sha256: str) -> int | None:
        try:
            text = self._path(sha256).read_text()
        except FileNotFoundError:
            return None
        return int(text, 16) if len(text) == 8 else None

    def _remember(self, sha256: str, value: int) -> None:
        with self._lock:
            self._memory[sha256] = value
            while len(self._memory) > _KEPT_IN_MEMORY:
                self._memory.popitem(last=False)
