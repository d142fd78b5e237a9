"""The logs of attempts whose machine was lost: what had reached the database goes to the blob store after a while."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import timedelta

from sqlalchemy import select, update

from artifacts.manifest import FileEntry
from storage import database as clock
from storage import job_logs
from storage.blob_rows import reserve_blobs
from storage.blobs import BlobStore
from storage.database import Database
from storage.log_text import mark
from storage.tables import JobAttemptRow, JobLogRow

OLDER_THAN = timedelta(hours=1)  # until then the machine may come back, with the whole log
_BATCH = 20


def rescue_logs(database: Database, blobs: BlobStore, older_than: timedelta = OLDER_THAN) -> int:
    """Keep the pieces of attempts that ended longer ago than `older_than`, as blobs; a whole log is not replaced.

    Returns:
        The number of attempts whose pieces are out of the database.

    Raises:
        DatabaseUnavailable, BlobStoreUnavailable, DiskFull
    """
    rescued = 0
    while True:
        with database.read() as session:
            over = (
                select(JobLogRow.job_id, JobLogRow.attempt)
                .join(
                    JobAttemptRow,
                    (JobAttemptRow.job_id == JobLogRow.job_id) & (JobAttemptRow.attempt == JobLogRow.attempt),
                )
                .where(JobAttemptRow.finished_at < clock.now(session) - older_than)
                .distinct()
                .limit(_BATCH)
            )
            keys = [(job_id, attempt) for job_id, attempt in session.execute(over)]
        for job_id, attempt in keys:
            _rescue(database, blobs, job_id, attempt)
        rescued += len(keys)
        if len(keys) < _BATCH:
            return rescued


def _rescue(database: Database, blobs: BlobStore, job_id: str, attempt: int) -> None:
    data = b"".join(_read(database, job_id, attempt))
    sha256 = hashlib.sha256(data).hexdigest()
    with database.write() as session:
        reserve_blobs(session, [FileEntry(f"{job_id}-{attempt}.log", sha256, len(data), "text/plain")])
    blobs.put_bytes(data)
    with database.write() as session:
        session.execute(
            update(JobAttemptRow)
            .where(JobAttemptRow.job_id == job_id, JobAttemptRow.attempt == attempt, JobAttemptRow.log_sha256.is_(None))
            .values(log_sha256=sha256)
            .execution_options(synchronize_session=False)
        )
        job_logs.drop_pieces(session, job_id, attempt)


def _read(database: Database, job_id: str, attempt: int) -> Iterator[bytes]:
    """The pieces, and a mark for what is missing between them."""
    offset = 0
    while True:
        with database.read() as session:
            pieces = job_logs.pieces_from(session, job_id, attempt, offset)
        for piece in pieces:
            if piece.offset > offset:
                yield mark(piece.offset - offset).encode()
            yield piece.text.encode()
            offset = piece.end
        if not pieces:
            return
