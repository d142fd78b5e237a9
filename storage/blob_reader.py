"""A blob as a file that can seek: for readers that want parts of it, without a copy on this machine's disk."""

from __future__ import annotations

import io
from typing import Any

from storage.blobs import BlobStore

BUFFER_BYTES = 1024**2


class BlobReader(io.RawIOBase):
    """Reads a blob by ranges. Every read is a request to the store, so put a buffer in front: `open_blob` does."""

    def __init__(self, blobs: BlobStore, sha256: str) -> None:
        super().__init__()
        self._blobs = blobs
        self._sha256 = sha256
        self._size = blobs.size(sha256)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"a position before the start: {start + offset}")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Raises BlobMissing, BlobCorrupt, BlobStoreUnavailable."""
        view = memoryview(buffer).cast("B")
        stop = min(self._position + len(view), self._size)
        count = 0
        if stop > self._position:
            for chunk in self._blobs.stream(self._sha256, self._position, stop):
                view[count : count + len(chunk)] = chunk
                count += len(chunk)
        self._position += count
        return count


def open_blob(blobs: BlobStore, sha256: str) -> io.BufferedReader:
    """The blob, buffered. A context manager.

    Raises:
        BlobMissing, BlobStoreUnavailable
    """
    return io.BufferedReader(BlobReader(blobs, sha256), BUFFER_BYTES)
