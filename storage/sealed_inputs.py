"""Confidential inputs of jobs, such as the seeds of a transfer: written with the job, read by its worker, never shown.

They are kept while the job waits or runs, and for a day after it has failed or was cancelled, for a retry.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Select, delete, null, select, update
from sqlalchemy.orm import Session

from artifacts.errors import NotFound, StateConflict
from storage import database
from storage.tables import TERMINAL_STATES, JobRow, SealedInputRow, TransferRow


def seal(session: Session, job_id: str, document: Mapping[str, Any]) -> None:
    """Keep the inputs of a new job, in the transaction that makes it. `document` is JSON."""
    session.add(SealedInputRow(job_id=job_id, document=dict(document), created_at=database.now(session)))
    session.flush()


def unseal(session: Session, job_id: str) -> dict[str, Any]:
    """The inputs of a job: for its worker only.

    Raises:
        NotFound: it has none, or none any more.
    """
    row = session.get(SealedInputRow, job_id)
    if row is None or row.document is None:
        raise NotFound(f"the confidential inputs of {job_id} are not there", hint="Submit the job again.")
    return row.document


def take_over(session: Session, job_id: str, retried: str) -> None:
    """Give a new job the inputs of the ended one that it is a retry of, if that one had any.

    Raises:
        StateConflict: they were removed since.
    """
    row = session.get(SealedInputRow, retried, with_for_update={"read": True})
    if row is None:
        return
    if row.document is None:
        raise StateConflict(
            f"the confidential inputs of {retried} were removed after it had ended; it can not be retried",
            hint="Submit a new job with them.",
        )
    seal(session, job_id, row.document)


def drop(session: Session, job_id: str) -> None:
    """Forget the job's inputs: it has succeeded, or they must not be kept."""
    session.execute(delete(SealedInputRow).where(SealedInputRow.job_id == job_id))


def drop_of_adapter(session: Session, adapter_id: str) -> None:
    """The adapter was deleted: forget the inputs of its transfers that have ended, retry or no retry."""
    ended = (
        select(TransferRow.job_id)
        .join(JobRow, JobRow.id == TransferRow.job_id)
        .where(TransferRow.adapter_id == adapter_id, JobRow.state.in_(TERMINAL_STATES))
    )
    _forget(session, ended)


def drop_ended(session: Session, cutoff: datetime) -> None:
    """Forget the inputs of jobs that ended before `cutoff`; that they had some is remembered."""
    ended = select(JobRow.id).where(JobRow.state.in_(TERMINAL_STATES), JobRow.finished_at < cutoff)
    _forget(session, ended)


def _forget(session: Session, jobs: Select[str]) -> None:
    session.execute(
        update(SealedInputRow)
        .where(SealedInputRow.job_id.in_(jobs), SealedInputRow.document.is_not(None))
        .values(document=null())
        .execution_options(synchronize_session=False)
    )
