"""Jobs as the pool sees them: claim one, keep its lease, write what an attempt did.

The attempt number is the fencing token. Every function that takes (job_id, attempt) locks the job's row and writes
only if that attempt is the current one; otherwise it raises AttemptStale and changes nothing. All times are the
database's.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from artifacts.errors import AttemptStale, StateConflict
from storage import database
from storage.claiming import Claim, Claims, SlotOffer, claim_many, claim_next, waits
from storage.conditions import IS_ACTIVE
from storage.queues import in_lock_order
from storage.servers import beat_server, list_servers, register_server
from storage.tables import JobAttemptRow, JobRow
from storage.text import mended
from storage.transitions import append_event, change_state, close_attempt, lock_attempt, lock_running

__all__ = [
    "Claim",
    "Claims",
    "Renewal",
    "SlotOffer",
    "beat_server",
    "claim_many",
    "claim_next",
    "expire_leases",
    "fence",
    "finish_cancelled",
    "finish_failed",
    "finish_succeeded",
    "list_servers",
    "record_log",
    "record_pid",
    "record_progress",
    "register_server",
    "release_previous_boots",
    "renew",
    "requeue",
    "waits",
]

MAX_FAILURES = 3
MAX_RESTARTS = 10
Renewal = Literal["ok", "cancel", "lost"]
_MESSAGE_LIMIT = 500
LEASE_CEILING = timedelta(hours=1)  # longer than any lease: what ends later was written before the clock was set back


def renew(
    session: Session, attempts: Sequence[tuple[str, int]], lease_seconds: float
) -> dict[tuple[str, int], Renewal]:
    """Prolong the leases of these (job, attempt) pairs from now on.

    Returns:
        For each: "ok"; "cancel": renewed, but it should stop; "lost": it is no longer the current attempt.
    """
    expires = database.now(session) + timedelta(seconds=lease_seconds)
    answers: dict[tuple[str, int], Renewal] = {}
    for job_id, attempt in sorted(attempts):  # one order for all, so that two renewals can not deadlock
        state = session.scalar(
            update(JobRow)
            .where(JobRow.id == job_id, JobRow.attempt == attempt, JobRow.state.in_(("running", "cancelling")))
            .values(lease_expires_at=expires)
            .returning(JobRow.state)
            .execution_options(synchronize_session=False)
        )
        answers[job_id, attempt] = "lost" if state is None else "cancel" if state == "cancelling" else "ok"
    return answers


def fence(session: Session, job_id: str, attempt: int) -> JobRow:
    """Lock the job for this attempt until the transaction ends; call it first when publishing.

    Raises:
        AttemptStale: a newer attempt owns the job, or it has ended.
        AttemptCancelled: the job is being cancelled.
    """
    return lock_running(session, job_id, attempt)


def record_pid(session: Session, job_id: str, attempt: int, pid: int) -> None:
    """Note the process that runs the attempt. Raises AttemptStale."""
    lock_attempt(session, job_id, attempt)
    _update_attempt(session, job_id, attempt, pid=pid)


def record_log(session: Session, job_id: str, attempt: int, sha256: str) -> None:
    """Note the blob that holds the attempt's log, also after the attempt has ended.

    Raises:
        AttemptStale: there is no such attempt.
    """
    _update_attempt(session, job_id, attempt, log_sha256=sha256)


def record_progress(
    session: Session,
    job_id: str,
    attempt: int,
    *,
    fraction: float,
    message: str,
    step: int | None = None,
    total: int | None = None,
) -> None:
    """Write how far the attempt is (fraction from 0 to 1) and an event that says so.

    Raises:
        AttemptStale, AttemptCancelled
    """
    job = lock_running(session, job_id, attempt)
    job.fraction = min(max(fraction, 0.0), 1.0)
    job.message = message[:_MESSAGE_LIMIT]
    job.step, job.total = step, total
    data = {"fraction": job.fraction, "step": step, "total": total, "message": job.message, "attempt": attempt}
    append_event(session, job, "progress", data, database.now(session))
    session.flush()


def finish_succeeded(session: Session, job_id: str, attempt: int, result: dict[str, Any]) -> None:
    """The attempt has published its result: part of the publishing transaction.

    Raises:
        AttemptStale
        AttemptCancelled: a cancel was asked for before; the result must not be published.
    """
    job = lock_running(session, job_id, attempt)
    moment = database.now(session)
    job.result, job.error, job.fraction = result, None, 1.0
    close_attempt(session, job, "succeeded", None, moment)
    change_state(session, job, "succeeded", moment)
    session.flush()


def finish_failed(
    session: Session,
    job_id: str,
    attempt: int,
    error: dict[str, Any],
    exit: dict[str, Any] | None = None,  # noqa: A002
) -> Literal["failed", "cancelled"]:
    """The attempt ended with an error that a retry would not mend. A job being cancelled ends cancelled, not failed.

    Raises:
        AttemptStale
    """
    job = lock_attempt(session, job_id, attempt)
    if job.state == "cancelling":
        _cancel(session, job, exit)
        return "cancelled"
    _fail(session, job, error, exit, "failed")
    return "failed"


def finish_cancelled(
    session: Session,
    job_id: str,
    attempt: int,
    exit: dict[str, Any] | None = None,  # noqa: A002
) -> None:
    """The attempt was stopped because a cancel was asked for, and its process is gone.

    Raises:
        AttemptStale
        StateConflict: nobody asked for a cancel; requeue the job instead.
    """
    job = lock_attempt(session, job_id, attempt)
    if job.state != "cancelling":
        raise StateConflict(f"{job_id} is {job.state}: nobody asked to cancel it", hint="Requeue the job.")
    _cancel(session, job, exit)


def requeue(
    session: Session,
    job_id: str,
    attempt: int,
    *,
    delay_seconds: float,
    error: dict[str, Any],
    exit: dict[str, Any] | None,  # noqa: A002
    max_failures: int = MAX_FAILURES,
) -> Literal["queued", "failed", "cancelled"]:
    """The attempt died of its infrastructure: run the job again after `delay_seconds`, at most `max_failures` times.

    Returns:
        The job's new state: "failed" when it has failed so more than `max_failures` times.

    Raises:
        AttemptStale
    """
    return _requeue(session, lock_attempt(session, job_id, attempt), delay_seconds, error, exit, max_failures)


def release_previous_boots(session: Session, server_id: str, boot_id: str, *, graceful: bool = False) -> int:
    """Release what this server ran before it was restarted: its worker processes died with it.

    The jobs go back to the queue at once with no failure counted; those being cancelled are cancelled. But a job that
    was running at more than `MAX_RESTARTS` deaths of a server fails: it may be what kills them.

    Args:
        graceful: the server has stopped its attempts itself.

    Returns:
        The number of jobs released.
    """
    jobs = session.scalars(
        select(JobRow)
        .where(JobRow.server_id == server_id, JobRow.boot_id != boot_id, IS_ACTIVE)
        .order_by(JobRow.id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).all()
    for job in in_lock_order(jobs):
        if not graceful:
            job.restarts += 1
        if job.restarts > MAX_RESTARTS and job.state == "running":
            _fail(session, job, _too_many_restarts(job.restarts), None, "lost")
            continue
        error = {"code": "server_restarted", "detail": "the server that ran the job was restarted"}
        _requeue(session, job, 0.0, error, None, None)
    return len(jobs)


def _too_many_restarts(times: int) -> dict[str, Any]:
    return {
        "code": "server_killed",
        "detail": f"{times} times a server died while it ran the job",
        "hint": "The job may be what kills it, for instance by taking all memory of the machine.",
    }


def expire_leases(session: Session, max_failures: int = MAX_FAILURES) -> int:
    """Take jobs back from servers that no longer renew their leases; each loss counts as a failure.

    Returns:
        The number of jobs taken back.
    """
    moment = database.now(session)
    over = or_(JobRow.lease_expires_at < moment, JobRow.lease_expires_at > moment + LEASE_CEILING)
    jobs = session.scalars(
        select(JobRow)
        .where(IS_ACTIVE, over)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
    for job in in_lock_order(jobs):
        error = {
            "code": "lease_expired",
            "detail": f"server {job.server_id} gave no sign of life while it ran the job",
            "hint": "Look at that server's log, and whether its host is up.",
        }
        _requeue(session, job, 0.0, error, None, max_failures)
    return len(jobs)


def _requeue(
    session: Session,
    job: JobRow,
    delay_seconds: float,
    error: dict[str, Any],
    ended: dict[str, Any] | None,
    max_failures: int | None,
) -> Literal["queued", "failed", "cancelled"]:
    """Requeue a locked job; with `max_failures` None no failure is counted."""
    if job.state == "cancelling":
        _cancel(session, job, ended)
        return "cancelled"
    if max_failures is not None:
        job.failures += 1
        if job.failures > max_failures:
            _fail(session, job, error, ended, "lost")
            return "failed"
    moment, error, ended = database.now(session), mended(error), mended(ended)
    close_attempt(session, job, "lost", ended, moment)
    job.available_at = moment + timedelta(seconds=delay_seconds)
    change_state(session, job, "queued", moment, reason=error, available_at=job.available_at.isoformat())
    session.flush()
    return "queued"


def _fail(session: Session, job: JobRow, error: dict[str, Any], ended: dict[str, Any] | None, outcome: str) -> None:
    moment, ended = database.now(session), mended(ended)
    job.error = {"hint": None, "exit": ended} | mended(error)
    close_attempt(session, job, outcome, ended, moment)
    change_state(session, job, "failed", moment, error=job.error)
    session.flush()


def _cancel(session: Session, job: JobRow, ended: dict[str, Any] | None) -> None:
    moment = database.now(session)
    close_attempt(session, job, "cancelled", mended(ended), moment)
    change_state(session, job, "cancelled", moment)
    session.flush()


def _update_attempt(session: Session, job_id: str, attempt: int, **values: Any) -> None:
    found = session.scalar(
        update(JobAttemptRow)
        .where(JobAttemptRow.job_id == job_id, JobAttemptRow.attempt == attempt)
        .values(**values)
        .returning(JobAttemptRow.attempt)
        .execution_options(synchronize_session=False)
    )
    if found is None:
        raise AttemptStale(f"there is no attempt {attempt} of {job_id}")
