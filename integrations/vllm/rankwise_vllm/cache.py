"""Adapters on this machine's disk, each version in a folder that is named by the digests of its files.

A folder appears whole or not at all and never changes: what vLLM has opened stays what it was, and two processes that
fetch one adapter at a time end with the same folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import time
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from rankwise_vllm.registry import Answer, Registry, StoredAdapter, StoredFile

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ABANDONED_SECONDS = 24 * 60 * 60
"""Age of a folder of an unfinished fetch whose process is taken to be dead."""
_UNFINISHED = ".fetch-"
_CHUNK = 1 << 20
_OVERHEAD = 1 << 20
"""Bytes that the headers of a zip may add, and files that the service makes, such as a configuration."""
_MAX_MEMBERS = 300
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class CacheError(Exception):
    """What came is not the adapter that was announced."""


class AdapterCache:
    """The folder of fetched adapters."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def place(self, adapter: StoredAdapter) -> Path:
        """Where the adapter lies, or will lie: a folder named by the names and digests of its files."""
        lines = sorted(f"{file.sha256} {file.path}\n" for file in adapter.files)
        return self._folder / hashlib.sha256("".join(lines).encode()).hexdigest()

    def fetch(self, registry: Registry, adapter: StoredAdapter) -> Path:
        """The adapter's folder, downloaded and compared with its digests unless it is there.

        Raises:
            RegistryError: no usable answer.
            CacheError: other bytes came, or it is not stored as vLLM reads it.
            OSError: the disk.
        """
        target = self.place(adapter)
        if target.is_dir():
            return target
        files = {file.path: file for file in adapter.files}
        if WEIGHTS not in files:
            raise CacheError(
                f"{adapter.id} is not stored as a PEFT adapter: POST /merge with it alone and method cat makes one"
            )
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._remove_abandoned()
        scratch = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self._folder))
        try:
            limit = sum(file.size for file in files.values()) + _OVERHEAD
            with tempfile.TemporaryFile(dir=scratch) as archive:
                with registry.download(adapter.id) as answer:
                    _copy(answer, archive, limit)
                _unpack(archive, scratch, files, limit)
            _publish(scratch, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return target

    def _remove_abandoned(self) -> None:
        """Remove what processes that were killed left behind."""
        oldest = time.time() - ABANDONED_SECONDS
        for folder in self._folder.glob(f"{_UNFINISHED}*"):
            try:
                abandoned = folder.lstat().st_mtime < oldest
            except OSError:  # another process is done with it
                continue
            if abandoned:
                shutil.rmtree(folder, ignore_errors=True)


def _copy(source: Answer | IO[bytes], target: IO[bytes], limit: int) -> tuple[str, int]:
    """Copy at most `limit` bytes; returns their SHA-256 and how many there were. Raises CacheError: there are more."""
    digest, left = hashlib.sha256(), limit
    while data := source.read(_CHUNK):
        left -= len(data)
        if left < 0:
            raise CacheError("more bytes came than the adapter has")
        digest.update(data)
        target.write(data)
    return digest.hexdigest(), limit - left


def _unpack(archive: IO[bytes], folder: Path, files: Mapping[str, StoredFile], limit: int) -> None:
    """Write all members, of at most `limit` bytes together.

    Raises CacheError: a file is missing, has other bytes, or a name that leads elsewhere.
    """
    try:
        with zipfile.ZipFile(archive) as found:
            members = found.infolist()
            names = [member.filename for member in members]
            if len(names) > _MAX_MEMBERS or len(set(names)) != len(names):
                raise CacheError("the download has too many files, or two of one name")
            missing = [name for name in (WEIGHTS, CONFIG) if name not in names]
            if missing:
                raise CacheError(f"the download has no {missing[0]}")
            for member in members:
                limit -= _extract(found, member, folder, files.get(member.filename), limit)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise CacheError("the download is no zip") from error


def _extract(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path, known: StoredFile | None, limit: int
) -> int:
    """How many bytes the member has."""
    name = member.filename
    if (
        not name
        or name != Path(name).name
        or name.startswith(".")
        or "\\" in name
        or stat.S_ISLNK(member.external_attr >> 16)
    ):
        raise CacheError(f"the download has a file called {name[:80]!r}")
    if member.compress_type not in _PACKED:
        raise CacheError(f"{name[:80]} is packed in a way that the service does not use")
    with archive.open(member) as source, (folder / name).open("xb") as target:
        digest, size = _copy(source, target, limit)
        target.flush()
        os.fsync(target.fileno())
    # A configuration that names a folder as its base model is handed out with another name.
    if known is not None and name != CONFIG and digest != known.sha256:
        raise CacheError(f"{name} came with the SHA-256 {digest}, not {known.sha256}")
    return size


def _publish(scratch: Path, target: Path) -> None:
    """Give the finished folder its name; another process may have been faster with the same one."""
    for entry in scratch.iterdir():
        entry.chmod(0o444)
    try:
        scratch.rename(target)
    except OSError:
        if not target.is_dir():
            raise
