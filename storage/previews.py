"""Previews: what the image of a job looks like while it is made. One of each job, gone when the job has its result."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from artifacts.errors import NotFound
from storage import database
from storage.tables import TERMINAL_STATES, JobPreviewRow, JobRow
from storage.text import is_storable
from storage.transitions import append_event, lock_running

MAX_BYTES = 256 * 1024
"""Of one preview: it lies in the database."""


def record_preview(
    session: Session, job_id: str, attempt: int, *, step: int, total: int, data: bytes, media_type: str
) -> None:
    """Replace the job's preview, with an event that tells where it is.

    Raises:
        AttemptStale, AttemptCancelled: nothing was written.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"a preview has at most {MAX_BYTES} bytes, not {len(data)}")
    job = lock_running(session, job_id, attempt)
    moment = database.now(session)
    row = session.get(JobPreviewRow, job_id)
    if row is None:
        row = JobPreviewRow(job_id=job_id)
        session.add(row)
    row.attempt, row.step, row.media_type, row.data, row.created_at = attempt, step, media_type, data, moment
    event = {"step": step, "total": total, "link": f"/jobs/{job_id}/preview", "attempt": attempt}
    append_event(session, job, "preview", event, moment)
    session.flush()


def get_preview(session: Session, job_id: str) -> JobPreviewRow:
    """The newest preview of a job.

    Raises:
        NotFound: it has none: not yet, or not any more.
    """
    row = session.get(JobPreviewRow, job_id) if is_storable(job_id) else None
    if row is None:
        raise NotFound(
            f"the job {job_id!r} has no preview",
            hint="One is there while the job runs, if preview_every asks for it; afterwards there is the image.",
        )
    return row


def drop_preview(session: Session, job_id: str) -> None:
    """Forget the job's preview, if there is one."""
    session.execute(delete(JobPreviewRow).where(JobPreviewRow.job_id == job_id))


def drop_ended(session: Session, cutoff: datetime) -> None:
    """Forget the previews of jobs that ended before `cutoff`."""
    ended = select(JobRow.id).where(JobRow.state.in_(TERMINAL_STATES), JobRow.finished_at < cutoff)
    session.execute(delete(JobPreviewRow).where(JobPreviewRow.job_id.in_(ended)))
