"""Jobs as their users see them: submit, look, cancel, retry, follow the events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from artifacts.errors import FieldError, NotFound, QueueFull, RequestInvalid, StateConflict
from storage import database
from storage.ids import new_id
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.tables import JOB_STATES, TERMINAL_STATES, JobAttemptRow, JobEventRow, JobRow
from storage.text import is_storable, storable
from storage.transitions import change_state, lock_job

MAX_QUEUED = 1000
_LARGEST_SEQUENCE = 2**31 - 1


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs to list; None does not filter."""

    kind: str | None = None
    state: str | None = None


def create_job(
    session: Session,
    kind: str,
    params: Mapping[str, Any],
    *,
    resources: Mapping[str, Any] | None = None,
    priority: int = 0,
    created_by: str | None = None,
    request_id: str | None = None,
    retry_of: str | None = None,
    max_queued: int = MAX_QUEUED,
) -> JobRow:
    """A new queued job and its first event. A higher `priority` is served first.

    Raises:
        QueueFull: `max_queued` jobs wait already (a limit on load: submissions at the same instant may pass it).
        RequestInvalid: the parameters can not be stored.
    """
    waiting = session.scalar(select(func.count()).select_from(JobRow).where(JobRow.state == "queued")) or 0
    if waiting >= max_queued:
        raise QueueFull(f"{waiting} jobs are waiting; at most {max_queued} may", hint="Try again when some have run.")
    moment = database.now(session)
    job = JobRow(
        id=new_id("job"),
        kind=storable(kind, "/kind", 24),
        params=dict(params),
        resources=dict(resources or {}),
        state="queued",
        priority=priority,
        attempt=0,
        failures=0,
        available_at=moment,
        cancel_requested=False,
        fraction=0.0,
        message="",
        last_event=0,
        created_by=created_by,
        request_id=None if request_id is None else storable(request_id, "/request_id", 64),
        retry_of=retry_of,
        created_at=moment,
    )
    session.add(job)
    session.flush()
    change_state(session, job, "queued", moment)
    session.flush()
    return job


def get_job(session: Session, job_id: str) -> JobRow:
    """Raises NotFound."""
    job = session.get(JobRow, job_id) if is_storable(job_id) else None
    if job is None:
        raise NotFound(f"there is no job {job_id!r}")
    return job


def list_jobs(
    session: Session, filters: JobFilter | None = None, cursor: str | None = None, limit: int = DEFAULT_LIMIT
) -> Page[JobRow]:
    """Newest first.

    Raises:
        RequestInvalid: an unknown state, a bad cursor or limit.
    """
    chosen = filters or JobFilter()
    statement = select(JobRow)
    if chosen.kind is not None:
        statement = statement.where(JobRow.kind == storable(chosen.kind, "/kind"))
    if chosen.state is not None:
        if chosen.state not in JOB_STATES:
            problem = f"must be one of {', '.join(JOB_STATES)}, not {chosen.state!r}"
            raise RequestInvalid(f"state {problem}", errors=[FieldError("/state", problem)])
        statement = statement.where(JobRow.state == chosen.state)
    return page_of(
        session, statement, (JobRow.created_at, JobRow.id), filters=asdict(chosen), cursor=cursor, limit=limit
    )


def request_cancel(session: Session, job_id: str) -> JobRow:
    """A queued job is cancelled at once; a running one is `cancelling` until its process is gone. Twice is once.

    Raises:
        NotFound
        StateConflict: the job has ended.
    """
    job = _lock(session, job_id)
    if job.state in TERMINAL_STATES:
        raise StateConflict(f"{job_id} has ended as {job.state} and can not be cancelled")
    if job.state == "cancelling":
        return job
    moment = database.now(session)
    job.cancel_requested = True
    change_state(session, job, "cancelled" if job.state == "queued" else "cancelling", moment)
    session.flush()
    return job


def retry_job(
    session: Session,
    job_id: str,
    *,
    created_by: str | None = None,
    request_id: str | None = None,
    max_queued: int = MAX_QUEUED,
) -> JobRow:
    """A new job with the same kind, parameters, resources and priority; `retry_of` names the old one.

    Raises:
        NotFound
        StateConflict: the job has not failed and was not cancelled.
        QueueFull
    """
    old = get_job(session, job_id)
    if old.state not in ("failed", "cancelled"):
        raise StateConflict(
            f"{job_id} is {old.state}; only a failed or cancelled job can be retried",
            hint="Wait until it ends, or submit a new job.",
        )
    return create_job(
        session,
        old.kind,
        old.params,
        resources=old.resources,
        priority=old.priority,
        created_by=created_by,
        request_id=request_id,
        retry_of=old.id,
        max_queued=max_queued,
    )


def events_after(session: Session, job_id: str, sequence: int, limit: int = 500) -> list[JobEventRow]:
    """The events with a larger sequence number than `sequence` (0: all), in order, at most `limit`."""
    if not is_storable(job_id) or sequence >= _LARGEST_SEQUENCE:
        return []
    statement = (
        select(JobEventRow)
        .where(JobEventRow.job_id == job_id, JobEventRow.sequence > sequence)
        .order_by(JobEventRow.sequence)
        .limit(limit)
    )
    return list(session.scalars(statement))


def attempts_of(session: Session, job_id: str) -> Sequence[JobAttemptRow]:
    """All attempts of a job, the first one first."""
    return session.scalars(
        select(JobAttemptRow).where(JobAttemptRow.job_id == job_id).order_by(JobAttemptRow.attempt)
    ).all()


def count_by_state(session: Session) -> dict[str, int]:
    """How many jobs are in each state; all states are there."""
    counted = dict.fromkeys(JOB_STATES, 0)
    for state, number in session.execute(select(JobRow.state, func.count()).group_by(JobRow.state)):
        counted[state] = number
    return counted


def queue_position(session: Session, row: JobRow) -> int | None:
    """The place in the queue: 1 is served next. None if the job does not wait."""
    if row.state != "queued":
        return None
    ahead = or_(
        JobRow.priority > row.priority,
        and_(JobRow.priority == row.priority, JobRow.created_at < row.created_at),
        and_(JobRow.priority == row.priority, JobRow.created_at == row.created_at, JobRow.id < row.id),
    )
    waiting = select(func.count()).select_from(JobRow).where(JobRow.state == "queued", ahead)
    return 1 + (session.scalar(waiting) or 0)


def _lock(session: Session, job_id: str) -> JobRow:
    job = lock_job(session, job_id) if is_storable(job_id) else None
    if job is None:
        raise NotFound(f"there is no job {job_id!r}")
    return job
