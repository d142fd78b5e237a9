"""The blob store: bytes under their own SHA-256, written once, verified when read whole."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from artifacts.errors import BlobCorrupt, BlobMissing, BlobStoreUnavailable, RangeInvalid
from storage.local_blobs import CHUNK, PREFIX, LocalBlobs, digest_of, translated
from storage.object_stores import first_line, open_store

if TYPE_CHECKING:
    from obstore import GetResult, ObjectMeta

SINGLE_PUT_LIMIT = 32 << 20  # a larger file goes up in parts
PART_SIZE = 8 << 20
MAX_PARTS = 9000  # S3 takes 10,000
UPLOADS_AT_ONCE = 4  # parts of one file: bounds the memory to 4 parts
FRESH = timedelta(hours=1)  # a blob older than this is written again when put, so that no sweep takes it for an orphan
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class BlobInfo:
    """One stored blob: its digest, its bytes, and when it was last put."""

    sha256: str
    size: int
    modified: datetime


class BlobStore:
    """Blobs at `blobs/sha256/ab/cd/<64 hex digits>` of the store that `url` names. Safe to use from many threads.

    Args:
        url: `file:///folder`, `s3://bucket/prefix`, `gs://…`, `az://…`, or `memory://` (this object's own memory).

    Raises:
        BlobStoreUnavailable: the URL or the settings of its kind are wrong.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._store, root = open_store(url)
        self._local = None if root is None else LocalBlobs(root)

    @property
    def staging_dir(self) -> Path | None:
        """A folder on the file system of a local store, so that what is staged there is put without a copy."""
        return None if self._local is None else self._local.staging

    def put_file(self, path: Path, sha256: str) -> int:
        """Keep a file unless its blob is there already. It is on disk, or acknowledged, when this returns.

        A local store takes over a file on its own file system by hard link: the file becomes read-only and must not
        be changed afterwards, only unlinked; its digest is the caller's word, and is checked when it is read. When
        bytes are copied or sent, they are hashed on the way.

        Args:
            sha256: the file's digest (64 lower-case hex digits).

        Returns:
            Its size in bytes.

        Raises:
            BlobCorrupt: the bytes that were copied or sent have another digest; nothing is kept.
            DiskFull, BlobStoreUnavailable
        """
        key = key_of(sha256)
        if self._local is not None:
            return self._local.put_file(path, key, sha256)
        with translated(path):
            size = path.stat().st_size
            if not self._is_fresh(sha256, size):
                self._send(path, size, key, sha256)
        return size

    def put_bytes(self, data: bytes) -> str:
        """Keep some bytes; returns their digest.

        Raises:
            DiskFull, BlobStoreUnavailable
        """
        sha256 = hashlib.sha256(data).hexdigest()
        key = key_of(sha256)
        if self._local is not None:
            self._local.put_bytes(data, key, sha256)
        elif not self._is_fresh(sha256, len(data)):
            self._put_once(key, data)
        return sha256

    def stream(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from `start` up to, not including, `end`, in chunks of about 1 MiB.

        The blob is opened when this is called, not at the first chunk. When the whole blob is read, its digest is
        checked, and the last chunk comes only if it is right.

        Raises:
            BlobMissing: there is no such blob.
            RangeInvalid: `start` is negative or beyond the end, or `end` is before `start`.
            BlobCorrupt: while iterating.
            BlobStoreUnavailable
        """
        size = self.size(sha256)
        stop = size if end is None else min(end, size)
        if start < 0 or start > size or stop < start:
            raise RangeInvalid(f"bytes {start} to {end} are not in a blob of {size} bytes")
        if start == stop:
            return iter(())
        with self._translated(sha256):
            opened = obstore.get(self._store, key_of(sha256), options={"range": (start, stop)})
        whole = start == 0 and stop == size
        return self._verified(opened, sha256) if whole else self._chunks(opened, sha256)

    def size(self, sha256: str) -> int:
        """Bytes of the blob. Raises BlobMissing, BlobStoreUnavailable."""
        return self._head(sha256)["size"]

    def exists(self, sha256: str) -> bool:
        """Whether the blob is there. Raises BlobStoreUnavailable."""
        try:
            self._head(sha256)
        except BlobMissing:
            return False
        return True

    def delete(self, sha256: str) -> None:
        """Remove the blob if it is there. Raises BlobStoreUnavailable."""
        try:
            with self._translated(sha256):
                obstore.delete(self._store, key_of(sha256))
        except BlobMissing:
            return

    def delete_if_older(self, sha256: str, moment: datetime) -> bool:
        """Remove the blob unless it was put since `moment`; whether it was removed. Raises BlobStoreUnavailable."""
        if self._local is not None:
            return self._local.delete_if_older(key_of(sha256), moment)
        try:
            if self._head(sha256)["last_modified"] >= moment:
                return False
        except BlobMissing:
            return False
        self.delete(sha256)
        return True

    def iter_blobs(self) -> Iterator[BlobInfo]:
        """All blobs, in no order. Raises BlobStoreUnavailable."""
        with self._translated(PREFIX):
            for batch in obstore.list(self._store, PREFIX, chunk_size=1000):
                for meta in batch:
                    digest = meta["path"].rsplit("/", 1)[-1]
                    if _DIGEST.fullmatch(digest):
                        yield BlobInfo(digest, meta["size"], meta["last_modified"])

    def iter_digests(self) -> Iterator[str]:
        """The digests of all blobs, in no order. Raises BlobStoreUnavailable."""
        for blob in self.iter_blobs():
            yield blob.sha256

    def materialize(self, sha256: str, cache_dir: Path) -> Path:
        """A local file with the blob's bytes, verified now; it must not be changed.

        A local store gives the stored file itself; another one downloads into `cache_dir` unless it is there, and
        an entry of the cache that has gone bad is downloaded again.

        Raises:
            BlobMissing, BlobCorrupt, BlobStoreUnavailable
            DiskFull: no space in `cache_dir`.
        """
        if self._local is not None:
            path = self._local.path(key_of(sha256))
            with translated(path):
                if not path.is_file():
                    raise BlobMissing(f"the blob {sha256} is not in the store")
                if digest_of(path) != sha256:
                    raise BlobCorrupt(f"the stored file {path} does not have the digest that names it")
            return path
        target = cache_dir / sha256[:2] / sha256
        with translated(cache_dir):
            if target.is_file() and digest_of(target) == sha256:
                return target
            self._download(sha256, target)
        return target

    def forget_cached(self, sha256: str, cache_dir: Path) -> None:
        """Remove what `materialize` may have downloaded into `cache_dir`: the bytes must not stay there.

        Raises:
            BlobStoreUnavailable
        """
        with translated(cache_dir):
            (cache_dir / sha256[:2] / sha256).unlink(missing_ok=True)

    def remove_stale_staging(self, moment: datetime, *, dry_run: bool = False) -> int:
        """Remove what lies in `staging_dir` untouched since `moment`; returns how many entries."""
        return 0 if self._local is None else self._local.remove_stale_staging(moment, dry_run=dry_run)

    def check(self) -> None:
        """Raise BlobStoreUnavailable or DiskFull unless the store can be used (a local one: written to)."""
        if self._local is not None:
            self._local.check()
            return
        try:
            with self._translated(PREFIX):
                next(iter(obstore.list(self._store, PREFIX, chunk_size=1)), None)
        except BlobMissing as error:
            raise BlobStoreUnavailable(f"the blob store {self.url} does not exist") from error

    def _head(self, sha256: str) -> ObjectMeta:
        with self._translated(sha256):
            return obstore.head(self._store, key_of(sha256))

    def _is_fresh(self, sha256: str, size: int) -> bool:
        """Whether the blob is there whole and was put lately."""
        try:
            meta = self._head(sha256)
        except BlobMissing:
            return False
        return meta["size"] == size and meta["last_modified"] > datetime.now(UTC) - FRESH

    def _send(self, path: Path, size: int, key: str, sha256: str) -> None:
        if size <= SINGLE_PUT_LIMIT:
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() != sha256:
                raise BlobCorrupt(f"{path.name} does not have the SHA-256 {sha256}")
            self._put_once(key, data)
            return
        # Parts can not be sent on the condition that the object is absent. The key fixes the bytes, the object
        # appears whole or not at all, and a wrong digest aborts it: so two writers can only write the same.
        part = max(PART_SIZE, -(-size // MAX_PARTS))
        with self._translated_put():
            obstore.put(
                self._store, key, _checked_parts(path, sha256, part), chunk_size=part, max_concurrency=UPLOADS_AT_ONCE
            )

    def _put_once(self, key: str, data: bytes) -> None:
        """Create the object; one that is there but stale or broken is written again, with the same name and bytes."""
        with self._translated_put():
            try:
                obstore.put(self._store, key, data, mode="create")
            except AlreadyExistsError:
                obstore.put(self._store, key, data, mode="overwrite", use_multipart=False)

    def _download(self, sha256: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix="download-")
        try:
            with os.fdopen(handle, "wb") as file:
                for chunk in self.stream(sha256):
                    file.write(chunk)
            Path(name).chmod(0o444)
            Path(name).replace(target)
        finally:
            Path(name).unlink(missing_ok=True)

    def _verified(self, opened: GetResult, sha256: str) -> Iterator[bytes]:
        """All chunks, the last one only if the digest of all is right."""
        digest = hashlib.sha256()
        previous: bytes | None = None
        for chunk in self._chunks(opened, sha256):
            if previous is not None:
                yield previous
            digest.update(chunk)
            previous = chunk
        if digest.hexdigest() != sha256:
            raise BlobCorrupt(f"the blob {sha256} came with the digest {digest.hexdigest()}")
        if previous is not None:
            yield previous

    def _chunks(self, opened: GetResult, sha256: str) -> Iterator[bytes]:
        with self._translated(sha256):
            yield from (bytes(chunk) for chunk in opened.stream(min_chunk_size=CHUNK))

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Failures of the object store as errors of our tree; what is not found is the blob `name`."""
        try:
            yield
        except FileNotFoundError as error:
            raise BlobMissing(f"the blob {name} is not in the store") from error
        except BaseError as error:
            raise BlobStoreUnavailable(f"the blob store {self.url} failed: {first_line(error)}") from error

    @contextmanager
    def _translated_put(self) -> Iterator[None]:
        """The same while writing, when what is not found is the bucket."""
        try:
            yield
        except (FileNotFoundError, BaseError) as error:
            raise BlobStoreUnavailable(f"the blob store {self.url} failed: {first_line(error)}") from error


def key_of(sha256: str) -> str:
    """The object's key. Raises BlobMissing if that is not a SHA-256, since no such blob can be."""
    if not _DIGEST.fullmatch(sha256):
        raise BlobMissing(f"{sha256!r} is not a SHA-256 in lower-case hex")
    return f"{PREFIX}/{sha256[:2]}/{sha256[2:4]}/{sha256}"


def _checked_parts(path: Path, sha256: str, part: int) -> Iterator[bytes]:
    """The file in parts; raises before the last one if the digest is wrong, so that the upload is never completed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        chunk = file.read(part)
        while chunk:
            digest.update(chunk)
            following = file.read(part)
            if not following and digest.hexdigest() != sha256:
                raise BlobCorrupt(f"{path.name} does not have the SHA-256 {sha256}")
            yield chunk
            chunk = following
