"""Checkpoints of jobs: the newest of each is kept until its job has succeeded, or has ended otherwise a day ago."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from artifacts.manifest import FileEntry
from storage import database
from storage.blob_rows import use_reserved
from storage.tables import TERMINAL_STATES, JobCheckpointRow, JobRow
from storage.transitions import lock_running


def record_checkpoint(session: Session, job_id: str, attempt: int, *, step: int, sha256: str, size: int) -> str | None:
    """The blob was reserved and is in the store: from now on the job goes on from it.

    A job that got further than before has no failures of its infrastructure to its count any more: they are limited in
    a row, not over the weeks that it may take.

    Returns:
        The digest of the checkpoint that it replaces, whose blob nobody needs any more.

    Raises:
        AttemptStale: a newer attempt owns the job; nothing was written.
        AttemptCancelled: the job is being cancelled.
    """
    job = lock_running(session, job_id, attempt)
    use_reserved(session, [FileEntry(path="checkpoint.tar", sha256=sha256, size=size, media_type="application/x-tar")])
    moment = database.now(session)
    row = session.get(JobCheckpointRow, job_id)
    if row is None or step > row.step:
        job.failures = 0
    if row is None:
        values = {"attempt": attempt, "step": step, "sha256": sha256, "size": size, "created_at": moment}
        session.add(JobCheckpointRow(job_id=job_id, **values))
        session.flush()
        return None
    replaced = None if row.sha256 == sha256 else row.sha256
    row.attempt, row.step, row.sha256, row.size, row.created_at = attempt, step, sha256, size, moment
    session.flush()
    return replaced


def take_over(session: Session, job_id: str, retried: str) -> None:
    """Have a new job go on where the ended one, which it is a retry of, had its last checkpoint, if there is one."""
    row = session.get(JobCheckpointRow, retried, with_for_update={"read": True})
    if row is None:
        return
    values = {"attempt": 0, "step": row.step, "sha256": row.sha256, "size": row.size}
    session.add(JobCheckpointRow(job_id=job_id, created_at=database.now(session), **values))
    session.flush()


def newest_checkpoint(session: Session, job_id: str) -> JobCheckpointRow | None:
    """Where the job goes on; None: at its beginning."""
    return session.get(JobCheckpointRow, job_id)


def drop_checkpoint(session: Session, job_id: str) -> str | None:
    """Forget the job's checkpoint; returns the digest of its blob, if there was one."""
    row = session.get(JobCheckpointRow, job_id)
    if row is None:
        return None
    session.delete(row)
    session.flush()
    return row.sha256


def drop_ended(session: Session, cutoff: datetime) -> int:
    """Forget the checkpoints of jobs that ended before `cutoff`; returns how many."""
    ended = select(JobRow.id).where(JobRow.state.in_(TERMINAL_STATES), JobRow.finished_at < cutoff)
    dropped = session.scalars(
        delete(JobCheckpointRow).where(JobCheckpointRow.job_id.in_(ended)).returning(JobCheckpointRow.job_id)
    )
    return len(dropped.all())
