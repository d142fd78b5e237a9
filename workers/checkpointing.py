"""A job's checkpoints: fetched when an attempt begins, published while it runs, each in the place of the one before."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

import structlog

from artifacts.content import file_sha256
from artifacts.errors import BlobStoreUnavailable, DatabaseUnavailable
from artifacts.manifest import FileEntry
from storage import checkpoints
from storage.blob_rows import reserve_blobs
from train.checkpoints import pack, unpack
from workers.context import JobContext
from workers.publishing import forget_blob

MEDIA_TYPE = "application/x-tar"

log = structlog.get_logger(__name__)


class Checkpoints:
    """Of the job of one attempt."""

    def __init__(self, context: JobContext) -> None:
        self._context = context

    def fetch(self) -> tuple[Path, int] | None:
        """The newest checkpoint, unpacked into the attempt's scratch, and its step; None if there is none yet.

        Raises:
            BlobMissing, BlobCorrupt, BlobStoreUnavailable, DiskFull, FileBroken
        """
        spec = self._context.spec
        with self._context.database.read() as session:
            row = checkpoints.newest_checkpoint(session, spec.job_id)
            if row is None:
                return None
            sha256, step = row.sha256, row.step
        archive = self._context.scratch / "resume.tar"
        self._context.fetch(sha256, archive)
        folder = unpack(archive, self._context.scratch / "resume")
        archive.unlink()
        log.info("checkpoint_fetched", job_id=spec.job_id, attempt=spec.attempt, step=step)
        return folder, step

    def publish(self, folder: Path, step: int, without: Set[str] = frozenset()) -> bool:
        """Keep the checkpoint in `folder`, without its folders of these names; whether it is kept.

        A database or a store that does not answer for a while costs this checkpoint, not the job.

        Raises:
            AttemptStale, AttemptCancelled: it was not recorded.
            DiskFull: there is no space for it.
        """
        context, spec = self._context, self._context.spec
        archive = pack(folder, context.scratch / f"checkpoint-{step}.tar", without)
        try:
            entry = FileEntry(archive.name, file_sha256(archive), archive.stat().st_size, MEDIA_TYPE)
            with context.database.write() as session:
                reserve_blobs(session, [entry])
            context.blobs.put_file(archive, entry.sha256)
            with context.database.write() as session:
                replaced = checkpoints.record_checkpoint(
                    session, spec.job_id, spec.attempt, step=step, sha256=entry.sha256, size=entry.size
                )
        except (DatabaseUnavailable, BlobStoreUnavailable) as error:
            log.warning("checkpoint_not_kept", job_id=spec.job_id, step=step, error=error.detail)
            return False
        finally:
            archive.unlink(missing_ok=True)
        log.info("checkpoint_kept", job_id=spec.job_id, attempt=spec.attempt, step=step, size=entry.size)
        if replaced is not None:
            forget_blob(context, replaced)
        return True
