"""A bound of the memory that this process may take more while a library works with what a stranger has sent."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/status")
_REFUSED = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""How torch's allocator and the C library say it."""


class BoundReached(Exception):
    """More was asked for than is allowed."""


@contextmanager
def at_most(more: int) -> Iterator[None]:
    """Within it, allocations that would take the process's own writable memory more than `more` bytes above what it has
    now fail at once, instead of having the process killed when they are used. Where the kernel does not say what that
    is (no Linux), there is no bound.

    Raises:
        BoundReached: what was done within ended by such a failure.
    """
    present = _own_memory()
    if present is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    allowed = min(limit for limit in (present + more, soft, hard) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))
    try:
        yield
    except MemoryError as error:
        raise BoundReached from error
    except (RuntimeError, OSError) as error:
        if any(text in str(error) for text in _REFUSED):
            raise BoundReached from error
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _own_memory() -> int | None:
    """Bytes of private writable memory, as the kernel counts them against RLIMIT_DATA."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("VmData:")), None)
    return None if found is None else int(found) * 1024
