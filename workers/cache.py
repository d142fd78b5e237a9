"""The folder of downloaded blobs on a worker's machine: bounded, the least recently used go first."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path


def place(source: Path, destination: Path) -> None:
    """Make a cached file readable at `destination` by a hard link, which outlives the cache's own; else by a copy.

    Raises:
        FileNotFoundError: the cache has just dropped it.
        OSError: the copy failed.
    """
    try:
        os.link(source, destination)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, destination)


def prune(folder: Path, limit: int) -> int:
    """Remove the least recently used files until the rest take at most `limit` bytes. Returns the bytes removed.

    Several workers share the folder: a file that another one removed first counts as removed.
    """
    files = []
    for path in folder.rglob("*") if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                status = path.stat()
                files.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    excess = sum(size for _, size, _ in files) - limit
    removed = 0
    for _, size, path in sorted(files):
        if removed >= excess:
            break
        path.unlink(missing_ok=True)
        removed += size
    return removed
