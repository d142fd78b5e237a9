"""The log file of an attempt: what the worker process writes while it runs the job."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storage.log_text import decode

TAIL_LINES = 200
TAIL_BYTES = 32 * 1024  # they are kept in the job's row


@contextmanager
def captured_output(path: Path) -> Iterator[None]:
    """Send this process's standard output and error, also that of C libraries and children, to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    saved = (os.dup(1), os.dup(2))
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        _flush()
        for fd, original in zip(saved, (1, 2), strict=True):
            os.dup2(fd, original)
            os.close(fd)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def read_tail(path: Path, lines: int = TAIL_LINES) -> list[str]:
    """The last lines of a log, of at most `TAIL_BYTES` bytes; [] when there is no log."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            data = file.read()
    except FileNotFoundError:
        return []
    return decode(data).splitlines()[-lines:]
