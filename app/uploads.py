"""An upload on its way to disk: every byte is hashed and written once, off the event loop, in bounded memory."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import uuid
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import anyio

from app.multipart import PartBegin, PartData, read_parts
from artifacts.errors import DiskFull, FieldError, RequestInvalid
from storage.faults import is_disk_full

BATCH_BYTES = 2 * 1024**2
"""Bytes that are collected before a thread writes them: one batch is filled while the one before is written."""

MAX_FILES = 200
MAX_FIELDS = 256
MAX_FIELD_BYTES = 64 * 1024
STAGING_PREFIX = "upl_"

T = TypeVar("T")
_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="upload")


@dataclass(frozen=True, slots=True)
class UploadedFile:
    """A staged file: the client's name for it, where it lies, SHA-256 (hex), CRC-32 and size in bytes."""

    name: str
    path: Path
    sha256: str
    crc32: int
    size: int


@dataclass(frozen=True, slots=True)
class Upload:
    """A received form: its text fields in order of arrival, its files, and the folder that goes when it is done."""

    folder: Path
    fields: dict[str, list[str]] = field(default_factory=dict)
    files: list[UploadedFile] = field(default_factory=list)


def write_some(descriptor: int, data: memoryview) -> int:
    """Write what the system takes at once; returns how many bytes that were."""
    return os.write(descriptor, data)


class StagedFile:
    """A file that grows by batches. `write` and `close` block and belong into a thread."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._crc32 = 0
        with full_disk_as_problem():
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def write(self, data: bytes) -> None:
        """Append `data`. Raises DiskFull."""
        rest = memoryview(data)
        with full_disk_as_problem():
            while rest:
                rest = rest[write_some(self._descriptor, rest) :]
        self._sha256.update(data)
        self._crc32 = zlib.crc32(data, self._crc32)
        self.size += len(data)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def result(self) -> UploadedFile:
        return UploadedFile(self.name, self.path, self._sha256.hexdigest(), self._crc32, self.size)


@contextmanager
def full_disk_as_problem() -> Iterator[None]:
    """Turn the operating system's refusal to write for want of space into DiskFull."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFull(
            "The disk that uploads are staged on is full.", hint="Free space in the data directory."
        ) from error


class _Receiver:
    """Takes the events of the form; at any time one batch of the current file is being written by a thread."""

    def __init__(self, upload: Upload, text_fields: frozenset[str], file_field: str) -> None:
        self.upload = upload
        self._text_fields = text_fields
        self._file_field = file_field
        self._file: StagedFile | None = None
        self._text: bytearray | None = None
        self._field = ""
        self._batch: list[bytes] = []
        self._batched = 0
        self._writing: asyncio.Future[None] | None = None
        self._fields = 0

    async def begin(self, part: PartBegin) -> None:
        self._field = part.name
        if part.name == self._file_field:
            count = len(self.upload.files)
            if count >= MAX_FILES:
                raise RequestInvalid(f"An upload has at most {MAX_FILES} files.")
            path = self.upload.folder / f"part-{count:04d}"
            self._file = await in_thread(StagedFile, part.file_name or "file", path)
        elif part.name in self._text_fields:
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise RequestInvalid(f"An upload has at most {MAX_FIELDS} fields.")
            self._text = bytearray()
        else:
            known = ", ".join(sorted({self._file_field, *self._text_fields}))
            raise RequestInvalid(
                f"The form has a field {part.name[:80]!r}, which means nothing here.",
                hint=f"Fields: {known}.",
                errors=[FieldError(f"/{part.name[:80]}", f"unknown field; known are {known}")],
            )

    async def add(self, data: bytes) -> None:
        if self._text is not None:
            self._text += data
            if len(self._text) > MAX_FIELD_BYTES:
                message = f"is over {MAX_FIELD_BYTES} bytes"
                raise RequestInvalid(
                    f"The field {self._field!r} {message}.", errors=[FieldError(f"/{self._field}", message)]
                )
            return
        self._batch.append(data)
        self._batched += len(data)
        if self._batched >= BATCH_BYTES:
            await self._flush()

    async def end(self) -> None:
        if self._text is not None:
            value = _decode(self._field, bytes(self._text))
            self.upload.fields.setdefault(self._field, []).append(value)
            self._text = None
        elif self._file is not None:
            await self._flush()
            await self._settle()
            await in_thread(self._file.close)
            self.upload.files.append(self._file.result())
            self._file = None

    async def _flush(self) -> None:
        """Hand the batch to a thread, once the one before is written."""
        await self._settle()
        if self._batch and self._file is not None:
            data = b"".join(self._batch)
            self._batch, self._batched = [], 0
            self._writing = asyncio.get_running_loop().run_in_executor(_threads, self._file.write, data)

    async def _settle(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            await writing

    async def abandon(self) -> None:
        """Close what is open, after its last write has ended: its error, if any, came too late to matter."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
            self._writing.exception()
            self._writing = None
        if self._file is not None:
            await in_thread(self._file.close)


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(_threads, function, *args)


def _decode(name: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestInvalid(
            f"The field {name!r} is not UTF-8.", errors=[FieldError(f"/{name}", "is not UTF-8")]
        ) from error


def make_folder(staging: Path) -> Path:
    folder = staging / f"{STAGING_PREFIX}{uuid.uuid4().hex}"
    with full_disk_as_problem():
        folder.mkdir(parents=True, mode=0o700)
    return folder


@asynccontextmanager
async def receive_upload(
    content_type: str,
    chunks: AsyncIterator[bytes],
    staging: Path,
    *,
    text_fields: frozenset[str],
    file_field: str = "file",
) -> AsyncIterator[Upload]:
    """Receive a form into a new folder under `staging`; the folder is gone when the context ends, however it ends.

    Raises:
        MalformedRequest, UnsupportedMedia: not a multipart form.
        RequestInvalid: an unknown field, too many parts, or text that is too long or not UTF-8.
        DiskFull: no space to stage it.
    """
    upload = Upload(await in_thread(make_folder, staging))
    receiver = _Receiver(upload, text_fields, file_field)
    try:
        async for event in read_parts(content_type, chunks):
            if isinstance(event, PartData):
                await receiver.add(event.data)
            elif isinstance(event, PartBegin):
                await receiver.begin(event)
            else:
                await receiver.end()
        yield upload
    finally:
        with anyio.CancelScope(shield=True):
            await receiver.abandon()
            await in_thread(shutil.rmtree, upload.folder)
