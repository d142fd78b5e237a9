"""Objects of S3 buckets that are not the blob store, with the endpoint and credentials of the environment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from artifacts.errors import FieldError, NotFound, RemoteUnavailable, RequestInvalid
from storage.object_stores import first_line, open_store

MAX_OBJECTS = 10_000
CHUNK_BYTES = 1 << 20
MAX_SMALL_BYTES = 4 << 20
_CREDENTIALS = "Its address and credentials are those of the environment (AWS_…) of the server and its workers."


@dataclass(frozen=True, slots=True)
class BucketObject:
    """An object: its key, bytes, and ETag if the store gives one."""

    key: str
    size: int
    etag: str | None


class Bucket:
    """A bucket by its name.

    Raises:
        BlobStoreUnavailable: the environment's settings for S3 are incomplete or unsafe.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._store, _ = open_store(f"s3://{name}")

    def find(self, key: str) -> BucketObject:
        """The object of that key. Raises RequestInvalid, RemoteUnavailable."""
        with self._translated(f"/key {key}"):
            meta = obstore.head(self._store, key)
        return BucketObject(meta["path"], meta["size"], meta["e_tag"])

    def children(self, prefix: str) -> list[BucketObject]:
        """The objects right under a prefix, as the files of a folder. Raises RequestInvalid, RemoteUnavailable."""
        folder = prefix.strip("/")
        with self._translated(f"/prefix {folder}"):
            listed = obstore.list_with_delimiter(self._store, prefix=folder or None)["objects"]
        if len(listed) > MAX_OBJECTS:
            problem = f"there are more than {MAX_OBJECTS} objects right under {folder!r}"
            raise RequestInvalid(f"T{problem[1:]}.", errors=[FieldError("/s3/prefix", problem)])
        found = [BucketObject(meta["path"], meta["size"], meta["e_tag"]) for meta in listed]
        return sorted(found, key=lambda item: item.key)

    def read(self, item: BucketObject) -> Iterator[bytes]:
        """The bytes of an object in chunks of about 1 MiB. Raises RequestInvalid, RemoteUnavailable."""
        with self._translated(f"/key {item.key}"):
            options: obstore.GetOptions = {} if item.etag is None else {"if_match": item.etag}
            for chunk in obstore.get(self._store, item.key, options=options).stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)

    def holds(self, key: str, size: int) -> bool:
        """Whether there is an object of that key and size. Raises RemoteUnavailable."""
        try:
            return self.find(key).size == size
        except RequestInvalid:
            return False

    def put_file(self, key: str, path: Path) -> None:
        """Write a file, in parts if it is large. Raises RemoteUnavailable."""
        with self._translated(f"/key {key}"):
            obstore.put(self._store, key, path)

    def put_bytes(self, key: str, data: bytes) -> None:
        """Write some bytes. Raises RemoteUnavailable."""
        with self._translated(f"/key {key}"):
            obstore.put(self._store, key, data)

    def get_small(self, key: str) -> tuple[bytes | None, str | None]:
        """The bytes of an object and its ETag; None and None if there is none.

        Raises:
            RequestInvalid: it has more than `MAX_SMALL_BYTES`.
            RemoteUnavailable
        """
        with self._translated(f"/key {key}"):
            try:
                found = obstore.get(self._store, key)
            except (NotFoundError, FileNotFoundError):
                return None, None
            if found.meta["size"] > MAX_SMALL_BYTES:
                problem = f"{key} has more than {MAX_SMALL_BYTES} bytes"
                raise RequestInvalid(f"{problem}.", errors=[FieldError("/s3/prefix", problem)])
            return bytes(found.bytes()), found.meta["e_tag"]

    def replace(self, key: str, data: bytes, etag: str | None) -> bool:
        """Write an object where there is none (`etag` None), or in the place of the one with that ETag; False if
        somebody else was quicker. Raises RemoteUnavailable."""
        with self._translated(f"/key {key}"):
            try:
                obstore.put(self._store, key, data, mode="create" if etag is None else {"e_tag": etag})
            except (AlreadyExistsError, PreconditionError):
                return False
        return True

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        field, _, name = what.partition(" ")
        try:
            yield
        except (NotFoundError, FileNotFoundError, NotFound) as error:
            problem = f"there is no {name!r} in the bucket {self.name}"
            raise RequestInvalid(f"T{problem[1:]}.", errors=[FieldError(f"/s3{field}", problem)]) from error
        except (PermissionDeniedError, UnauthenticatedError, PermissionError) as error:
            problem = f"the bucket {self.name} does not allow {name!r} to this server"
            raise RequestInvalid(
                f"T{problem[1:]}: {first_line(error)}", hint=_CREDENTIALS, errors=[FieldError(f"/s3{field}", problem)]
            ) from error
        except (BaseError, OSError) as error:
            raise RemoteUnavailable(
                f"The bucket {self.name} can not be used: {first_line(error)}",
                hint=_CREDENTIALS,
            ) from error
