"""Appends to an upload: the body is cut into segments, and each is durable before the next one is begun.

What has come when a client leaves is kept too. A server that is killed loses at most the segment that it was receiving.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import anyio
import structlog

from app.auth import Principal
from app.state import Services
from app.uploads import BATCH_BYTES, StagedFile, in_thread, make_folder
from artifacts.errors import NotFound, RankwiseError, StateConflict, TooLarge
from artifacts.manifest import FileEntry
from storage import uploads
from storage.blob_rows import end_reservation, reserve_blobs
from storage.sweep import remove_unused
from storage.tables import UploadRow

SEGMENT_BYTES = 16 * 1024**2
"""Bytes that are collected before they are stored: what a killed server loses, and the size of a stored piece."""


_log = structlog.stdlib.get_logger(__name__)


def lifetime_of(services: Services) -> timedelta:
    """How long an upload is kept after its last byte."""
    return timedelta(hours=services.settings.staging_max_age_hours)


def find_upload(services: Services, principal: Principal, upload_id: str) -> UploadRow:
    """Raises NotFound: there is none, or not for this key."""
    with services.database.read() as session:
        return uploads.get_upload(session, upload_id, owner=principal.key_id, everyones="admin" in principal.scopes)


async def append(
    services: Services, principal: Principal, upload_id: str, offset: int, chunks: AsyncIterator[bytes]
) -> UploadRow:
    """Store the bytes of `chunks` as those from `offset` on; returns the upload as it is then.

    Raises:
        NotFound, StateConflict: there is no such upload of this key, or it takes no more bytes.
        UploadOffsetMismatch: the next byte is another one, or another append was faster.
        TooLarge: more bytes than were announced; those up to there are kept.
        BlobStoreUnavailable, DatabaseUnavailable, DiskFull: what was stored before is kept.
    """
    row = await in_thread(find_upload, services, principal, upload_id)
    uploads.check_open(row)
    uploads.check_offset(row, offset)
    appender = _Appender(services, row, await in_thread(make_folder, services.staging))
    try:
        try:
            async for chunk in chunks:
                await appender.add(chunk)
            await appender.keep()
        except BaseException as error:
            with anyio.CancelScope(shield=True), suppress(RankwiseError):
                if not appender.refused:
                    await appender.keep()
            raise error
    finally:
        with anyio.CancelScope(shield=True):
            await in_thread(appender.close)
    return await in_thread(find_upload, services, principal, upload_id)


def drop_blobs(services: Services, digests: Sequence[str]) -> None:
    """Remove the bytes of segments now, unless something else has the same ones; the sweep takes what this leaves."""
    for digest in digests:
        try:
            remove_unused(services.database, services.blobs, digest)
        except RankwiseError as error:
            _log.warning("segment_not_removed", sha256=digest, code=error.code, detail=error.detail)


class _Appender:
    def __init__(self, services: Services, row: UploadRow, folder: Path) -> None:
        self._services, self._row, self._folder = services, row, folder
        self._offset = row.received
        self._room = row.length - row.received
        self._segment: StagedFile | None = None
        self._batch: list[bytes] = []
        self._batched = 0
        self.refused = False

    async def add(self, chunk: bytes) -> None:
        """Raises TooLarge, with the bytes up to the announced length taken."""
        taken = chunk[: self._room]
        self._room -= len(taken)
        if taken:
            self._batch.append(taken)
            self._batched += len(taken)
        if self._batched >= BATCH_BYTES:
            await self._write()
        if self._segment is not None and self._segment.size >= SEGMENT_BYTES:
            await self.keep()
        if len(taken) < len(chunk):
            raise TooLarge(
                f"The upload {self._row.id} was announced with {self._row.length} bytes, and more came.",
                hint="Begin a new upload with the right length.",
            )

    async def _write(self) -> None:
        data = b"".join(self._batch)
        self._batch, self._batched = [], 0
        try:
            with anyio.CancelScope(shield=True):
                if self._segment is None:
                    self._segment = await in_thread(StagedFile, "segment", self._folder / f"{self._offset}")
                await in_thread(self._segment.write, data)
        except BaseException:
            # Some of the batch may be in the file and is not in its digest: the segment is no blob any more.
            self.refused = True
            raise

    async def keep(self) -> None:
        """Make durable, and count, what has come."""
        if self._batch:
            await self._write()
        if self._segment is None:
            return
        segment, self._segment = self._segment, None
        try:
            await in_thread(self._store, segment)
        except BaseException:
            self.refused = True
            raise

    def _store(self, segment: StagedFile) -> None:
        segment.close()
        found = segment.result()
        if not found.size or found.path.stat().st_size != found.size:
            raise AssertionError(f"a segment of {found.path.stat().st_size} bytes was hashed over {found.size}")
        with self._services.database.write() as session:
            reserve_blobs(session, [FileEntry(found.name, found.sha256, found.size, "application/octet-stream")])
        self._services.blobs.put_file(found.path, found.sha256)
        found.path.unlink()
        try:
            with self._services.database.write() as session:
                uploads.add_segment(
                    session, self._row.id, self._offset, found.size, found.sha256, lifetime_of(self._services)
                )
        except (NotFound, StateConflict):
            with suppress(RankwiseError), self._services.database.write() as session:
                end_reservation(session, found.sha256)
            drop_blobs(self._services, [found.sha256])
            raise
        self._offset += found.size
        self._services.metrics.upload_bytes.inc(found.size)

    def close(self) -> None:
        """Blocks: belongs into a thread."""
        if self._segment is not None:
            self._segment.close()
        shutil.rmtree(self._folder)
