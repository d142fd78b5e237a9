"""The counters of the queue: how many jobs of each owner wait and run, by the number of devices that they need.

Every change of a job's state writes them in the same transaction, so that neither a claim nor a submission has to
count jobs. Who changes several jobs in one transaction does so in the order of (owner, devices): two of them can then
not wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TypeVar

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from storage.tables import JobQueueRow, JobRow
from storage.upsert import dialect_insert

T = TypeVar("T", bound=JobRow)
_COUNTED = {"queued": "queued", "running": "running", "cancelling": "running"}


def count_change(session: Session, job: JobRow, before: str | None, after: str | None) -> None:
    """Count a job that went from one state to another; None is "not there"."""
    changes = {"queued": 0, "running": 0}
    if before in _COUNTED:
        changes[_COUNTED[before]] -= 1
    if after in _COUNTED:
        changes[_COUNTED[after]] += 1
    if any(changes.values()):
        _add(session, job.owner, job.devices, changes, None)


def count_claims(session: Session, taken: Mapping[tuple[str, int], int], served_at: datetime) -> None:
    """Count jobs that were claimed: (owner, devices) → how many."""
    for (owner, devices), number in sorted(taken.items()):
        _add(session, owner, devices, {"queued": -number, "running": number}, served_at)


def _add(session: Session, owner: str, devices: int, changes: dict[str, int], served_at: datetime | None) -> None:
    statement = dialect_insert(session, JobQueueRow).values(
        owner=owner, devices=devices, served_at=served_at, **changes
    )
    set_ = {
        "queued": JobQueueRow.queued + changes["queued"],
        "running": JobQueueRow.running + changes["running"],
    }
    if served_at is not None:
        set_["served_at"] = statement.excluded.served_at
    session.execute(
        statement.on_conflict_do_update(index_elements=["owner", "devices"], set_=set_),
        execution_options={"synchronize_session": False},
    )


def in_lock_order(jobs: Iterable[T]) -> list[T]:
    """The jobs in the order in which one transaction may change them."""
    return sorted(jobs, key=lambda job: (job.owner, job.devices, job.id))


def waiting_in_all(session: Session) -> int:
    """Jobs that wait."""
    return session.scalar(select(func.coalesce(func.sum(JobQueueRow.queued), 0))) or 0


def waiting_of(session: Session, owner: str) -> int:
    """Jobs of this owner that wait."""
    queued = func.coalesce(func.sum(JobQueueRow.queued), 0)
    return session.scalar(select(queued).where(JobQueueRow.owner == owner)) or 0


def running_devices_of(session: Session, owner: str) -> int:
    """Device slots that this owner's jobs hold."""
    held = func.coalesce(func.sum(JobQueueRow.running * JobQueueRow.devices), 0)
    return session.scalar(select(held).where(JobQueueRow.owner == owner)) or 0
