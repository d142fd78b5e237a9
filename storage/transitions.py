"""How a job's row changes: under a lock, with an event for every change, and never once it has ended."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from artifacts.errors import AttemptCancelled, AttemptStale
from storage import webhooks
from storage.queues import count_change
from storage.tables import TERMINAL_STATES, JobAttemptRow, JobEventRow, JobRow


def lock_job(session: Session, job_id: str) -> JobRow | None:
    """The job's row as it is now, locked against other writers until the transaction ends."""
    return session.scalars(
        select(JobRow).where(JobRow.id == job_id).with_for_update().execution_options(populate_existing=True)
    ).one_or_none()


def lock_attempt(session: Session, job_id: str, attempt: int) -> JobRow:
    """The locked job, if `attempt` is its current one and still runs (state running or cancelling).

    Raises:
        AttemptStale: a newer attempt owns the job, or the job has ended.
    """
    job = lock_job(session, job_id)
    if job is None or job.attempt != attempt or job.state not in ("running", "cancelling"):
        found = "there is no such job" if job is None else f"the job is {job.state} in attempt {job.attempt}"
        raise AttemptStale(
            f"attempt {attempt} of {job_id} is not the current one: {found}", hint="Stop; its writes no longer count."
        )
    return job


def lock_running(session: Session, job_id: str, attempt: int) -> JobRow:
    """Like `lock_attempt`, and nobody asked for a cancel.

    Raises:
        AttemptStale, AttemptCancelled
    """
    job = lock_attempt(session, job_id, attempt)
    if job.state == "cancelling":
        raise AttemptCancelled(f"{job_id} is being cancelled")
    return job


def append_event(session: Session, job: JobRow, kind: str, data: dict[str, Any], moment: datetime) -> JobEventRow:
    """Write the next event of a locked job; the lock makes the sequence gapless and increasing."""
    job.last_event += 1
    event = JobEventRow(job_id=job.id, sequence=job.last_event, type=kind, data=data, created_at=moment)
    session.add(event)
    return event


def change_state(session: Session, job: JobRow, state: str, moment: datetime, **details: Any) -> None:
    """Move a locked job to `state`, count it there and tell it in an event, with `details` that are not None."""
    if job.state in TERMINAL_STATES:
        raise AssertionError(f"{job.id} has ended as {job.state} and can not become {state}")
    before, job.state = job.state, state
    if state in TERMINAL_STATES:
        job.finished_at = moment
    if state in TERMINAL_STATES or state == "queued":
        job.boot_id = job.slot = job.lease_expires_at = None
    shown = {name: value for name, value in details.items() if value is not None}
    append_event(session, job, "state", {"state": state, "attempt": job.attempt} | shown, moment)
    if state in TERMINAL_STATES:
        webhooks.enqueue_job_end(session, job, moment)
    count_change(session, job, before, state)  # last: others wait for the counter until the transaction ends


def close_attempt(session: Session, job: JobRow, outcome: str, ended: dict[str, Any] | None, moment: datetime) -> None:
    """Write how the current attempt ended."""
    values: dict[str, Any] = {"outcome": outcome, "finished_at": moment}
    if ended is not None:
        values["exit"] = ended
    session.execute(
        update(JobAttemptRow)
        .where(JobAttemptRow.job_id == job.id, JobAttemptRow.attempt == job.attempt)
        .values(**values)
        .execution_options(synchronize_session=False)
    )
