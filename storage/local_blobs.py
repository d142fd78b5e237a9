"""Blobs as files of a local folder: write-once by hard link, on disk before they count."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from artifacts.errors import BlobCorrupt, BlobStoreUnavailable, DiskFull
from storage import faults

PREFIX = "blobs/sha256"
CHUNK = 1 << 20
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES}


class LocalBlobs:
    """The folder of a local store.

    Writers hold a shared lock, a sweep that deletes holds it alone: so no blob is deleted between the moment at which
    a writer found it there and the moment at which its date was renewed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.staging = root / "staging"
        with translated(root):
            self.staging.mkdir(parents=True, exist_ok=True)
            blobs = root / PREFIX
            blobs.mkdir(parents=True, exist_ok=True)
            for folder in (blobs.parent, root):
                _sync_folder(folder)

    def path(self, key: str) -> Path:
        """Where the blob with this key is, or would be."""
        return self.root / key

    def put_file(self, source: Path, key: str, sha256: str) -> int:
        """Make `source` the blob `key` unless that is there; returns its size in bytes."""
        with translated(self.root), self._lock(fcntl.LOCK_SH):
            size = source.stat().st_size
            if not self._renew(key, size):
                self._add(source, key, sha256)
            return size

    def put_bytes(self, data: bytes, key: str, sha256: str) -> None:
        """Make `data` the blob `key` unless that is there."""
        with translated(self.root), self._lock(fcntl.LOCK_SH):
            if self._renew(key, len(data)):
                return
            with self._staged() as staged:
                staged.write_bytes(data)
                self._link(staged, key)

    def delete_if_older(self, key: str, moment: datetime) -> bool:
        """Delete the blob unless it was written or put again since `moment`."""
        path = self.path(key)
        with translated(self.root), self._lock(fcntl.LOCK_EX):
            try:
                if path.stat().st_mtime >= moment.timestamp():
                    return False
                path.unlink()
            except FileNotFoundError:
                return False
        return True

    def remove_stale_staging(self, moment: datetime, *, dry_run: bool) -> int:
        """Remove what was staged and not touched since `moment`: uploads that were given up. Returns how many."""
        stale = 0
        with translated(self.root):
            for entry in list(self.staging.iterdir()):
                # What goes away meanwhile belongs to an upload that has just ended, or to another sweep.
                with suppress(FileNotFoundError):
                    if _newest(entry) >= moment.timestamp():
                        continue
                    stale += 1
                    if not dry_run:
                        _remove(entry)
        return stale

    def check(self) -> None:
        """Write and delete a file. Raises DiskFull or BlobStoreUnavailable."""
        with translated(self.root), self._staged() as staged:
            staged.write_bytes(b"rankwise")

    def _renew(self, key: str, size: int) -> bool:
        """Whether the blob is there whole; then it counts as new for the sweep. A truncated one is not it."""
        path = self.path(key)
        try:
            if path.stat().st_size != size:
                return False
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _add(self, source: Path, key: str, sha256: str) -> None:
        try:
            self._link(source, key)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            with self._staged() as staged:
                digest = _copy(source, staged)
                if digest != sha256:
                    raise BlobCorrupt(f"{source.name} has the SHA-256 {digest}, not {sha256}") from error
                self._link(staged, key)

    def _link(self, source: Path, key: str) -> None:
        """Give the file its final name once its bytes are on disk; replaces a blob of the wrong size."""
        path = self.path(key)
        with source.open("rb") as file:
            os.fsync(file.fileno())
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, path)
        except FileExistsError:
            if path.stat().st_size != source.stat().st_size:
                self._replace(source, path)
        path.chmod(0o444)
        os.utime(path)
        for folder in (path.parent, path.parent.parent, path.parent.parent.parent):
            _sync_folder(folder)

    def _replace(self, source: Path, path: Path) -> None:
        other = self.staging / f"replace-{os.urandom(8).hex()}"
        os.link(source, other)
        other.replace(path)

    @contextmanager
    def _staged(self) -> Iterator[Path]:
        handle, name = tempfile.mkstemp(dir=self.staging, prefix="put-")
        os.close(handle)
        try:
            yield Path(name)
        finally:
            Path(name).unlink(missing_ok=True)

    @contextmanager
    def _lock(self, kind: int) -> Iterator[None]:
        with (self.root / "lock").open("a") as file:
            fcntl.flock(file, kind)
            yield


@contextmanager
def translated(place: Path) -> Iterator[None]:
    """Failures of the file system as errors of our tree."""
    try:
        yield
    except OSError as error:
        if faults.is_disk_full(error):
            raise DiskFull(f"no space left in {place}", hint="Free some space, then try again.") from error
        raise BlobStoreUnavailable(f"{error.filename or place} can not be used: {error.strerror}") from error


def digest_of(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(source: Path, target: Path) -> str:
    """Copy and return the SHA-256 of what was copied."""
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK):
            digest.update(chunk)
            writer.write(chunk)
    return digest.hexdigest()


def _newest(entry: Path) -> float:
    """The latest change of a file, or of anything inside a folder."""
    newest = entry.lstat().st_mtime
    if entry.is_dir() and not entry.is_symlink():
        newest = max([newest, *(child.lstat().st_mtime for child in entry.rglob("*"))])
    return newest


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
