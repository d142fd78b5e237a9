"""Rounds of federated trainings: each client's part is a job of its own, or is done on the client's own machine
(`storage.remote_clients`), and the training waits until all have ended.

The training is a job that is claimed for a moment between two rounds. It writes down whom it asks and queues itself
until they have answered (`AWAITING`), so it holds no device meanwhile. What a client gives becomes visible in the
transaction that ends its job. `settle`, which every server does again and again, notices the clients that will give
nothing, and wakes the trainings whose round is over: whoever dies at any moment, the round goes on from these rows.

Rows are locked in one order: the job of a client, its update, the training's job, the counters of the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from artifacts.errors import StateConflict
from artifacts.manifest import FileEntry
from storage import database, jobs
from storage.blob_rows import reserve_blobs
from storage.conditions import AWAITING, IS_QUEUED
from storage.tables import TERMINAL_STATES, ClientUpdateRow, JobRow
from storage.transitions import append_event, change_state, close_attempt, lock_running

_PENDING = text("client_updates.state = 'pending'")


@dataclass(frozen=True, slots=True)
class Asked:
    """A client that is asked in a round, and the parameters of the job that does its steps. None: it has none."""

    client: int
    params: Mapping[str, Any] | None


def open_round(
    session: Session, run_id: str, round_: int, asked: Sequence[Asked], *, seconds: float, affinity: str | None
) -> None:
    """Ask these clients, unless the round is open already. The training's job is locked."""
    run = jobs.get_job(session, run_id)
    moment = database.now(session)
    if session.scalar(_of(run_id, round_).limit(1)) is None:
        for item in asked:
            child = None
            if item.params is not None:
                child = jobs.create_job(
                    session,
                    jobs.CLIENT_UPDATE,
                    item.params,
                    priority=run.priority,
                    affinity=affinity,
                    created_by=run.created_by,
                    request_id=run.request_id,
                    max_queued=None,
                )
            session.add(
                ClientUpdateRow(
                    job_id=run_id,
                    round=round_,
                    client=item.client,
                    state="pending",
                    child_id=None if child is None else child.id,
                    details={},
                    deadline=moment + timedelta(seconds=seconds),
                    created_at=moment,
                )
            )
    # What went into the average is in the checkpoint.
    session.execute(
        update(ClientUpdateRow)
        .where(ClientUpdateRow.job_id == run_id, ClientUpdateRow.round < round_, ClientUpdateRow.sha256.is_not(None))
        .values(sha256=None)
        .execution_options(synchronize_session=False)
    )
    session.flush()


def suspend(
    session: Session,
    job_id: str,
    attempt: int,
    *,
    before: Callable[[Session], None],
    message: str,
    fraction: float,
) -> None:
    """Queue the job until `settle`, or the last client, wakes it. Counts no failure.

    Raises:
        AttemptStale, AttemptCancelled
    """
    job = lock_running(session, job_id, attempt)
    before(session)
    moment = database.now(session)
    job.message, job.fraction, job.step, job.total = message, fraction, None, None
    data = {"fraction": fraction, "step": None, "total": None, "message": message, "attempt": attempt}
    append_event(session, job, "progress", data, moment)
    close_attempt(session, job, "paused", None, moment)
    job.available_at = AWAITING
    change_state(session, job, "queued", moment, reason={"code": "waits_for_clients", "detail": message})
    session.flush()


def updates_of(session: Session, run_id: str, round_: int) -> list[ClientUpdateRow]:
    """The clients of a round, in their order; none if it was not opened."""
    return list(session.scalars(_of(run_id, round_).order_by(ClientUpdateRow.client)))


def answer(
    session: Session, run_id: str, round_: int, client: int, file: FileEntry, details: Mapping[str, Any]
) -> None:
    """The client's tensors are in the store: part of the transaction that ends its job, whose row is locked.

    Raises:
        StateConflict: nobody waits for them any more.
    """
    row = session.get(ClientUpdateRow, (run_id, round_, client), with_for_update=True, populate_existing=True)
    if row is None or row.state != "pending":
        found = "there is no such round" if row is None else f"the client counts as {row.state}"
        raise StateConflict(f"round {round_ + 1} of {run_id} does not wait for client {client} any more: {found}")
    record_answer(session, row, file, details)


def record_answer(session: Session, row: ClientUpdateRow, file: FileEntry, details: Mapping[str, Any]) -> None:
    """The client of `row`, which is locked, has answered; the training goes on if it was the last one."""
    reserve_blobs(session, [file])
    row.state, row.sha256, row.details, row.finished_at = "answered", file.sha256, dict(details), database.now(session)
    session.flush()
    _wake(session, row.job_id)


def record_refusals(session: Session, run_id: str, attempt: int, round_: int, reasons: Mapping[int, str]) -> None:
    """What these clients gave can not be used.

    Raises:
        AttemptStale, AttemptCancelled
    """
    lock_running(session, run_id, attempt)
    for client, reason in sorted(reasons.items()):
        session.execute(
            update(ClientUpdateRow)
            .where(ClientUpdateRow.job_id == run_id, ClientUpdateRow.round == round_, ClientUpdateRow.client == client)
            .values(state="refused", reason=reason)
            .execution_options(synchronize_session=False)
        )


def record_epsilons(session: Session, run_id: str, round_: int, epsilons: Mapping[int, float]) -> None:
    """ε that these clients have spent with this round, beside what they gave."""
    for row in updates_of(session, run_id, round_):
        if row.client in epsilons:
            row.details = {**row.details, "epsilon": epsilons[row.client]}
    session.flush()


def unsettled(session: Session) -> list[str]:
    """Trainings that may need `settle`: with clients that are waited for, or waiting themselves, or over with files of
    clients left."""
    pending = session.scalars(select(ClientUpdateRow.job_id).where(_PENDING).distinct()).all()
    waiting = session.scalars(select(JobRow.id).where(IS_QUEUED, JobRow.available_at == AWAITING)).all()
    over = session.scalars(
        select(ClientUpdateRow.job_id)
        .join(JobRow, JobRow.id == ClientUpdateRow.job_id)
        .where(ClientUpdateRow.sha256.is_not(None), JobRow.state.in_(TERMINAL_STATES))
        .distinct()
    ).all()
    return sorted({*pending, *waiting, *over})


def settle(session: Session, run_id: str) -> list[str]:
    """Mark the clients that will give nothing, and wake the training if its round is over.

    Returns:
        Ids of clients' jobs that nobody waits for any more, to be cancelled in transactions of their own.
    """
    moment = database.now(session)
    run = session.get(JobRow, run_id, populate_existing=True)
    over = run is None or run.state in TERMINAL_STATES
    rows = session.scalars(
        select(ClientUpdateRow)
        .where(ClientUpdateRow.job_id == run_id, _PENDING)
        .order_by(ClientUpdateRow.round, ClientUpdateRow.client)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
    stopped = []
    for row in rows:
        child = None if row.child_id is None else jobs.get_job(session, row.child_id)
        if over:
            row.state, row.reason = "lost", "the training has ended"
        elif child is not None and child.state in TERMINAL_STATES:
            row.state, row.reason = "lost", _why(child)
        elif moment >= row.deadline:
            row.state, row.reason = "late", f"not done at {row.deadline.isoformat(timespec='seconds')}"
        else:
            continue
        row.finished_at = moment
        if child is not None and child.state not in TERMINAL_STATES:
            stopped.append(child.id)
    session.flush()
    if over:
        forget_given(session, run_id)
    else:
        _wake(session, run_id)
    return stopped


def stop_client(session: Session, job_id: str) -> None:
    """Cancel a client's job that nobody waits for; one that has ended meanwhile is left."""
    try:
        jobs.request_cancel(session, job_id)
    except StateConflict:
        return


def rounds_after(session: Session, run_id: str, after: int, limit: int) -> list[ClientUpdateRow]:
    """The clients of at most `limit` rounds behind round `after` (counted from 1, 0: from the first), in order.

    Raises NotFound: there is no such job.
    """
    jobs.get_job(session, run_id)
    rows = select(ClientUpdateRow).where(
        ClientUpdateRow.job_id == run_id, ClientUpdateRow.round >= after, ClientUpdateRow.round < after + limit
    )
    return list(session.scalars(rows.order_by(ClientUpdateRow.round, ClientUpdateRow.client)))


def forget_given(session: Session, run_id: str) -> None:
    """The training has ended: what clients gave is not needed any more."""
    session.execute(
        update(ClientUpdateRow)
        .where(ClientUpdateRow.job_id == run_id, ClientUpdateRow.sha256.is_not(None))
        .values(sha256=None)
        .execution_options(synchronize_session=False)
    )


def _of(run_id: str, round_: int) -> Any:
    return select(ClientUpdateRow).where(ClientUpdateRow.job_id == run_id, ClientUpdateRow.round == round_)


def _wake(session: Session, run_id: str) -> None:
    """Have the training claimed, if it waits and no client is waited for."""
    waited_for = select(ClientUpdateRow.client).where(ClientUpdateRow.job_id == run_id, _PENDING).limit(1)
    if session.scalar(waited_for) is not None:
        return
    session.execute(
        update(JobRow)
        .where(JobRow.id == run_id, IS_QUEUED, JobRow.available_at == AWAITING)
        .values(available_at=database.now(session))
        .execution_options(synchronize_session=False)
    )


def _why(child: JobRow) -> str:
    if child.state == "failed" and child.error is not None:
        return f"{child.error.get('code')}: {child.error.get('detail')}"[:2000]
    return f"its job {child.id} was cancelled" if child.state == "cancelled" else "its job gave nothing"
