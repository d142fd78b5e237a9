"""Fleets: firings that make one job for each of many adapters.

Which adapters a firing is about is decided in the transaction of the firing, as rows under the unique key (schedule,
occurrence, adapter digest). Each row becomes a job in a transaction of its own, which locks the schedule: whoever is
killed between two of them has made exactly those that are written, and any server makes the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import exists, func, or_, select, text, update
from sqlalchemy.orm import Session

from artifacts.errors import (
    BlobStoreUnavailable,
    DatabaseUnavailable,
    DiskFull,
    NotFound,
    QueueFull,
    QuotaExceeded,
    RankwiseError,
)
from storage import database, selectors
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.selectors import Chosen, Selector
from storage.tables import FiringItemRow, FiringRow, JobRow, ScheduleRow, TransferRow
from storage.text import is_storable
from storage.windows import Window

MAX_FLEET = 10_000
"""Adapters of one firing."""
_PENDING = text("firing_items.state = 'pending'")
_UNFINISHED = text("jobs.state IN ('queued', 'running', 'cancelling')")


@dataclass(frozen=True, slots=True)
class MadeJob:
    """The job of an adapter. `is_new` is false if one that does the same was there."""

    job: JobRow
    is_new: bool


SubmitItem = Callable[[Session, ScheduleRow, str], MadeJob]
"""Checks and creates the job of a schedule for an adapter (id); raises RankwiseError to refuse it."""


@dataclass(frozen=True, slots=True)
class FleetFigures:
    """How far a fleet is.

    Attributes:
        states: "pending" (no job yet), "already" (moved before, or under way by another job), "refused", or the state
            of the job → adapters.
        verdicts: of the gate → adapters.
    """

    total: int
    states: Mapping[str, int] = field(default_factory=dict)
    verdicts: Mapping[str, int] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether nothing of it waits or runs any more."""
        return not any(self.states.get(state) for state in ("pending", "queued", "running", "cancelling"))


def write_items(session: Session, firing: FiringRow, selector: Selector) -> int:
    """Decide which adapters a new firing is about; how many they are.

    Raises:
        NotFound: the base model is gone.
        QuotaExceeded: more than `MAX_FLEET`.
    """
    chosen = selectors.choose(session, selector, MAX_FLEET + 1)
    if len(chosen) > MAX_FLEET:
        raise QuotaExceeded(
            f"more than {MAX_FLEET} adapters match; a firing takes at most so many", hint="Narrow the selector."
        )
    session.add_all(_item(firing, adapter) for adapter in chosen)
    session.flush()
    return len(chosen)


def any_open(session: Session, row: ScheduleRow) -> bool:
    """Whether a fleet of the schedule has adapters that wait for their jobs."""
    waits = select(FiringItemRow.adapter_id).where(FiringItemRow.schedule_id == row.id, _PENDING)
    return session.scalar(waits.limit(1)) is not None


def ready(session: Session, moment: datetime | None = None) -> list[str]:
    """Ids of the schedules for one of whose adapters a job can be made now."""
    moment = moment or database.now(session)
    waiting = session.scalars(
        select(ScheduleRow)
        .where(exists().where(FiringItemRow.schedule_id == ScheduleRow.id, _PENDING))
        .where(or_(ScheduleRow.enabled.is_(True), ScheduleRow.deleted_at.is_not(None)))
        .order_by(ScheduleRow.id)
    ).all()
    return [row.id for row in waiting if row.deleted_at is not None or _may_start(session, row, moment)]


def feed(
    session: Session, schedule_id: str, submit: SubmitItem, *, moment: datetime | None = None
) -> FiringItemRow | None:
    """Make the job of the next adapter that waits, of the oldest firing first.

    One for each transaction: a job locks its adapter and then the counters of the queue, so that two of them in one
    transaction could wait for a submission that waits for them.

    Returns:
        The item; None if none waits, no job may start now, or another server has the schedule in hand. A deleted
        schedule's items are refused all at once, and the first of them returned.

    Raises:
        QueueFull, QuotaExceeded: roll back and try again later; the item still waits.
        DatabaseUnavailable, BlobStoreUnavailable, DiskFull: the same.
    """
    row = session.scalars(
        select(ScheduleRow)
        .where(ScheduleRow.id == schedule_id)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).one_or_none()
    moment = moment or database.now(session)
    if row is None:
        return None
    if row.deleted_at is not None:
        return _give_up(session, row)
    if not row.enabled or not _may_start(session, row, moment):
        return None
    item = _next(session, row)
    if item is None:
        return None
    try:
        with session.begin_nested():
            made = submit(session, row, item.adapter_id)
        item.state, item.job_id = ("job" if made.is_new else "already"), made.job.id
    except (QueueFull, QuotaExceeded, DatabaseUnavailable, BlobStoreUnavailable, DiskFull):
        raise
    except RankwiseError as error:
        item.state, item.detail = "refused", f"{error.code}: {error.detail}"
    session.flush()
    return item


def get_firing(session: Session, schedule_id: str, occurrence: str) -> FiringRow:
    """Raises NotFound."""
    row = session.get(FiringRow, (schedule_id, occurrence)) if is_storable(occurrence) else None
    if row is None:
        raise NotFound(
            f"schedule {schedule_id} has no firing {occurrence[:80]!r}", hint="GET /schedules/{id}/firings lists them."
        )
    return row


def figures(session: Session, firing: FiringRow) -> FleetFigures:
    """Counts of all its adapters."""
    of_firing = (FiringItemRow.schedule_id == firing.schedule_id, FiringItemRow.occurrence == firing.occurrence)
    states: dict[str, int] = {}
    verdicts: dict[str, int] = {}
    rows = session.execute(
        select(FiringItemRow.state, JobRow.state, TransferRow.verdict, func.count())
        .outerjoin(JobRow, JobRow.id == FiringItemRow.job_id)
        .outerjoin(TransferRow, TransferRow.job_id == FiringItemRow.job_id)
        .where(*of_firing)
        .group_by(FiringItemRow.state, JobRow.state, TransferRow.verdict)
    )
    for item, job, verdict, number in rows:
        state = job if item == "job" else item
        states[state] = states.get(state, 0) + number
        if verdict is not None:
            verdicts[verdict] = verdicts.get(verdict, 0) + number
    return FleetFigures(sum(states.values()), states, verdicts)


def list_items(
    session: Session, firing: FiringRow, cursor: str | None = None, limit: int = DEFAULT_LIMIT
) -> Page[FiringItemRow]:
    """Its adapters, in the reverse order of their ids.

    Raises:
        RequestInvalid: a bad cursor or limit.
    """
    fixed = [(FiringItemRow.schedule_id, firing.schedule_id), (FiringItemRow.occurrence, firing.occurrence)]
    return page_of(
        session,
        select(FiringItemRow),
        (FiringItemRow.created_at, FiringItemRow.adapter_id),
        filters={"schedule": firing.schedule_id, "occurrence": firing.occurrence},
        cursor=cursor,
        limit=limit,
        fixed=fixed,
    )


def jobs_of(session: Session, items: Sequence[FiringItemRow]) -> tuple[dict[str, JobRow], dict[str, TransferRow]]:
    """The jobs of these items and their transfers, by the job's id."""
    wanted = [item.job_id for item in items if item.job_id is not None]
    jobs = session.scalars(select(JobRow).where(JobRow.id.in_(wanted)))
    moves = session.scalars(select(TransferRow).where(TransferRow.job_id.in_(wanted)))
    return {job.id: job for job in jobs}, {row.job_id: row for row in moves}


def selector_of(row: ScheduleRow) -> Selector | None:
    """Which adapters the schedule moves; None if it makes one job."""
    return None if row.job_selector is None else fleet_selector(row.job_selector, row.job_params)


def fleet_selector(document: Mapping[str, Any], params: Mapping[str, Any]) -> Selector:
    """The selector of a fleet's job. `base_model` and `target_model` are ids."""
    return Selector(
        base_model=document["base_model"],
        owner=document.get("owner"),
        tags=tuple(document.get("tags") or ()),
        name=document.get("name"),
        transferable=document.get("transferable"),
        without_transfer_to=params["target_model"] if document.get("without_transfer_to") else None,
    )


def _item(firing: FiringRow, adapter: Chosen) -> FiringItemRow:
    return FiringItemRow(
        schedule_id=firing.schedule_id,
        occurrence=firing.occurrence,
        adapter_digest=adapter.digest,
        adapter_id=adapter.id,
        adapter_name=adapter.name,
        state="pending",
        created_at=firing.created_at,
    )


def _next(session: Session, row: ScheduleRow) -> FiringItemRow | None:
    return session.scalars(
        select(FiringItemRow)
        .where(FiringItemRow.schedule_id == row.id, _PENDING)
        .order_by(FiringItemRow.created_at, FiringItemRow.adapter_id)
        .limit(1)
    ).one_or_none()


def _may_start(session: Session, row: ScheduleRow, moment: datetime) -> bool:
    """Whether the window is open and fewer than `max_parallel` of its jobs are unfinished."""
    if row.window is not None and not Window.of(row.window).is_open(moment):
        return False
    if row.max_parallel is None:
        return True
    unfinished = select(func.count()).select_from(JobRow).where(JobRow.schedule_id == row.id, _UNFINISHED)
    return (session.scalar(unfinished) or 0) < row.max_parallel


def _give_up(session: Session, row: ScheduleRow) -> FiringItemRow | None:
    first = _next(session, row)
    session.execute(
        update(FiringItemRow)
        .where(FiringItemRow.schedule_id == row.id, _PENDING)
        .values(state="refused", detail="the schedule was deleted")
    )
    return first
