"""What memory a merge may hold beyond the factors of its modules, and how this process hands freed memory back."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 128 * 2**20
MAPPED_FROM_BYTES = 32 * 2**20


@cache
def keep_freed_memory() -> bool:
    """Let the C library reuse buffers of a few megabytes instead of returning each to the kernel, once per process.

    A merge allocates and frees the same handful of buffers for every module; by default each is a mapping of its own,
    whose pages the kernel zeroes again each time: a fifth of the whole merge. At most `KEPT_BYTES` per thread stay
    with the process. Returns whether the C library knows the setting (glibc does).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    accepted = mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
    return bool(accepted)


class Room:
    """A number of bytes that threads share: who finds none left does without."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._lock = threading.Lock()

    @contextmanager
    def taken(self, size: int) -> Iterator[bool]:
        """Whether there is room for `size` bytes, which are given back at the end."""
        with self._lock:
            granted = size <= self._left
            if granted:
                self._left -= size
        try:
            yield granted
        finally:
            if granted:
                with self._lock:
                    self._left += size
