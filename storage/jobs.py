"""Jobs as their users see them: submit, look, cancel, retry, follow the events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from artifacts.errors import FieldError, NotFound, QueueFull, QuotaExceeded, RequestInvalid, StateConflict
from storage import checkpoints, database, queues, sealed_inputs, transfers
from storage.ids import new_id
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.queues import count_change
from storage.tables import (
    ANONYMOUS,
    JOB_STATES,
    TERMINAL_STATES,
    ApiKeyRow,
    JobAttemptRow,
    JobEventRow,
    JobRow,
)
from storage.text import is_storable, storable
from storage.transitions import append_event, change_state, lock_job

MAX_QUEUED = 1000
RETRY_SECONDS = 10
CLIENT_UPDATE = "client_update"
"""The kind of jobs that are parts of a federated training (`storage.federations`)."""
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
    affinity: str | None = None,
    created_by: str | None = None,
    request_id: str | None = None,
    retry_of: str | None = None,
    schedule_id: str | None = None,
    max_queued: int | None = MAX_QUEUED,
) -> JobRow:
    """A new queued job and its first event.

    Args:
        resources: {devices: number of device slots (default 1), timeout_seconds: longest run of an attempt}.
        priority: of the jobs of one owner, the highest is served first.
        affinity: id of the base model that the job will load.
        created_by: the API key that asked for it, which owns it.
        max_queued: jobs of all owners that may wait; None: no limit holds, for the job is a part of one that runs.

    Raises:
        QueueFull: `max_queued` jobs wait already.
        QuotaExceeded: as many jobs of this API key wait as it may have waiting.
        RequestInvalid: the parameters can not be stored, or more devices than this API key's jobs may ever hold.
    """
    moment = database.now(session)
    job = JobRow(
        id=new_id("job"),
        kind=storable(kind, "/kind", 24),
        owner=created_by or ANONYMOUS,
        devices=int((resources or {}).get("devices", 1)),
        affinity=None if affinity is None else storable(affinity, "/affinity", 64),
        params=dict(params),
        resources=dict(resources or {}),
        state="queued",
        precedence=-priority,
        attempt=0,
        failures=0,
        restarts=0,
        available_at=moment,
        cancel_requested=False,
        fraction=0.0,
        message="",
        last_event=0,
        created_by=created_by,
        request_id=None if request_id is None else storable(request_id, "/request_id", 64),
        retry_of=retry_of,
        schedule_id=schedule_id,
        created_at=moment,
    )
    session.add(job)
    session.flush()
    append_event(session, job, "state", {"state": "queued", "attempt": 0}, moment)
    count_change(session, job, None, "queued")  # locks the owner's counter: what is read now stays true
    session.flush()
    if max_queued is not None:
        _check_limits(session, job, max_queued)
    return job


def _check_limits(session: Session, job: JobRow, max_queued: int) -> None:
    """Refuse the new job, which the counters have already, when too many wait or it could never run."""
    waiting = queues.waiting_in_all(session) - 1
    if waiting >= max_queued:
        raise QueueFull(
            f"{waiting} jobs are waiting; at most {max_queued} may",
            hint="Try again when some have run.",
            retry_after=RETRY_SECONDS,
        )
    key = session.get(ApiKeyRow, job.created_by) if job.created_by is not None else None
    if key is None:
        return
    if key.max_running is not None and job.devices > key.max_running:
        problem = f"{job.devices} devices; the jobs of the API key {key.name!r} may hold {key.max_running} at once"
        raise RequestInvalid(
            f"the job asks for {problem}",
            hint="Ask for fewer devices, or for a larger limit.",
            errors=[FieldError("/resources/devices", problem)],
        )
    if key.max_queued is None:
        return
    own = queues.waiting_of(session, job.owner) - 1
    if own >= key.max_queued:
        raise QuotaExceeded(
            f"{own} jobs of the API key {key.name!r} are waiting; at most {key.max_queued} may",
            hint="Try again when some have run, or ask for a larger limit.",
            retry_after=RETRY_SECONDS,
        )


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
    fixed: list[tuple[Any, str]] = []
    if chosen.kind is not None:
        fixed.append((JobRow.kind, storable(chosen.kind, "/kind")))
    if chosen.state is not None:
        if chosen.state not in JOB_STATES:
            problem = f"must be one of {', '.join(JOB_STATES)}, not {chosen.state!r}"
            raise RequestInvalid(f"state {problem}", errors=[FieldError("/state", problem)])
        fixed.append((JobRow.state, chosen.state))
    return page_of(
        session,
        select(JobRow),
        (JobRow.created_at, JobRow.id),
        filters=asdict(chosen),
        cursor=cursor,
        limit=limit,
        fixed=fixed,
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

    It goes on from the last checkpoint of the old one, while that is kept, with the same confidential inputs.

    Raises:
        NotFound
        StateConflict: the job has not failed and was not cancelled, or its confidential inputs are gone.
        QueueFull
    """
    old = retryable(session, job_id)
    job = create_job(
        session,
        old.kind,
        old.params,
        resources=old.resources,
        priority=old.priority,
        affinity=old.affinity,
        created_by=created_by,
        request_id=request_id,
        retry_of=old.id,
        max_queued=max_queued,
    )
    checkpoints.take_over(session, job.id, old.id)
    sealed_inputs.take_over(session, job.id, old.id)
    transfers.take_over(session, job, old.id)
    return job


def retryable(session: Session, job_id: str) -> JobRow:
    """The job, if it may be retried.

    Raises:
        NotFound
        StateConflict: it has not failed and was not cancelled.
    """
    job = get_job(session, job_id)
    if job.kind == CLIENT_UPDATE:
        raise StateConflict(
            f"{job_id} is a client's part of the training {job.params.get('run')}", hint="Retry that training."
        )
    if job.state not in ("failed", "cancelled"):
        raise StateConflict(
            f"{job_id} is {job.state}; only a failed or cancelled job can be retried",
            hint="Wait until it ends, or submit a new job.",
        )
    return job


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


def _lock(session: Session, job_id: str) -> JobRow:
    job = lock_job(session, job_id) if is_storable(job_id) else None
    if job is None:
        raise NotFound(f"there is no job {job_id!r}")
    return job
