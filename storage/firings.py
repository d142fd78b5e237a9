"""Firings: a schedule that is due makes a job, once, however many servers see it and whatever the clock does.

A firing is a row under the unique key (schedule, occurrence), written in one transaction with the job that it makes.
The occurrence is the time of the timetable, the id of an event, or an id of its own when someone asked for it. Of
several times that went by unseen, only the last can make a job; the others are one row, which says how many they were.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from sqlalchemy import exists, or_, select, text, update
from sqlalchemy.orm import Session

from artifacts.errors import (
    BlobStoreUnavailable,
    DatabaseUnavailable,
    DiskFull,
    RankwiseError,
    StateConflict,
)
from storage import database, domain_events, fleets, jobs, schedules
from storage.ids import new_id
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.queues import in_lock_order
from storage.tables import DomainEventRow, FiringRow, JobRow, ScheduleRow
from storage.upsert import insert_or_ignore

ON_TIME = timedelta(seconds=60)
"""A firing that is seen later than this was missed."""
COUNTED = 1000
"""Missed firings are counted up to here."""

Submit = Callable[[Session, ScheduleRow], JobRow]
"""Checks and creates the job of a schedule; raises RankwiseError to refuse it."""

_WAITS = text("schedules.next_fire_at IS NOT NULL")
_UNFINISHED = text("jobs.state IN ('queued', 'running', 'cancelling')")


def is_due(session: Session, moment: datetime | None = None) -> bool:
    """Whether a schedule is to fire."""
    moment = moment or database.now(session)
    return session.scalar(select(ScheduleRow.id).where(_WAITS, ScheduleRow.next_fire_at <= moment).limit(1)) is not None


def fire_due(session: Session, submit: Submit, *, limit: int = 1, moment: datetime | None = None) -> list[FiringRow]:
    """Fire the schedules that are due, those due the longest first; what another server fires now is passed over.

    Args:
        limit: most schedules of this transaction.
        moment: None: the database's clock.

    Returns:
        The firings written; none if nothing was due, or only what had been fired already.

    Raises:
        DatabaseUnavailable, BlobStoreUnavailable, DiskFull: roll back and try again later.
    """
    moment = moment or database.now(session)
    due = session.scalars(
        select(ScheduleRow)
        .where(_WAITS, ScheduleRow.next_fire_at <= moment)
        .order_by(ScheduleRow.next_fire_at, ScheduleRow.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    ).all()
    return [firing for row in due for firing in _fire_times(session, row, submit, moment)]


def fire_event(session: Session, submit: Submit, *, moment: datetime | None = None) -> FiringRow | None:
    """Fire one schedule that waits for the oldest open event; an event that no schedule waits for any more is closed.

    One schedule for each transaction, so that two of them never wait for each other's jobs.

    Returns:
        The firing; None if no event is open, or all of them are in the hands of other servers.

    Raises:
        DatabaseUnavailable, BlobStoreUnavailable, DiskFull: roll back and try again later.
    """
    moment = moment or database.now(session)
    while (event := domain_events.lock_oldest_open(session)) is not None:
        row = _waiting_for(session, event)
        if row is not None:
            return _fire(session, row, submit, event.id, event.created_at, moment)
        domain_events.close(session, event, moment)
    return None


def trigger_now(session: Session, schedule_id: str, submit: Submit, *, moment: datetime | None = None) -> FiringRow:
    """Fire now, also while it is disabled (but for a fleet); its times stay as they are.

    Raises:
        NotFound
        StateConflict: its overlap policy is "skip", and a job of it is unfinished; or it moves a fleet and is disabled.
        RankwiseError: what `submit` raises.
    """
    row = schedules.lock_schedule(session, schedule_id)
    moment = moment or database.now(session)
    running = _unfinished(session, row)
    if running and row.overlap == "skip":
        raise StateConflict(
            f"{running[0].id} of this schedule is {running[0].state}, and its overlap policy is to skip",
            hint="Wait until that job ends, cancel it, or set overlap to queue or replace.",
        )
    if fleets.any_open(session, row):
        raise StateConflict(
            "adapters of an earlier firing of this schedule still wait for their jobs",
            hint="Wait until they are done; GET /schedules/{id}/firings shows how far it is.",
        )
    selector = fleets.selector_of(row)
    if selector is not None and not row.enabled:
        raise StateConflict(
            f"{row.id} is paused, and so are the jobs of its fleets", hint="Enable it, then trigger it."
        )
    firing = FiringRow(
        schedule_id=row.id,
        occurrence=new_id("trg"),
        due_at=moment,
        outcome="job" if selector is None else "fleet",
        detail="triggered by a request",
        created_at=moment,
    )
    if selector is None:
        _make_way(session, row, running)
        firing.job_id = submit(session, row).id
    session.add(firing)
    session.flush()
    if selector is not None:
        fleets.write_items(session, firing, selector)
    return firing


def resettle(session: Session, *, moment: datetime | None = None) -> int:
    """Compute anew when each schedule next fires, where that lies ahead: after the clock went back, it comes earlier.

    A time that has fired already does not fire again. Also takes over new rules of time zones.

    Returns:
        How many schedules have another time now.
    """
    moment = moment or database.now(session)
    ahead = session.scalars(select(ScheduleRow).where(_WAITS, ScheduleRow.next_fire_at > moment)).all()
    changed = 0
    for row in ahead:
        expected = schedules.next_fire_at(row, moment)
        if expected == row.next_fire_at:
            continue
        # Only if nobody has fired or changed it since it was read.
        moved = session.scalar(
            update(ScheduleRow)
            .where(ScheduleRow.id == row.id, ScheduleRow.next_fire_at == row.next_fire_at)
            .values(next_fire_at=expected)
            .returning(ScheduleRow.id)
            .execution_options(synchronize_session=False)
        )
        changed += moved is not None
    return changed


def list_firings(
    session: Session, schedule_id: str, cursor: str | None = None, limit: int = DEFAULT_LIMIT
) -> Page[FiringRow]:
    """What came of a schedule, newest first.

    Raises:
        NotFound
        RequestInvalid: a bad cursor or limit.
    """
    schedules.get_schedule(session, schedule_id)
    statement = select(FiringRow).where(FiringRow.schedule_id == schedule_id)
    keys = (FiringRow.created_at, FiringRow.occurrence)
    fixed = [(FiringRow.schedule_id, schedule_id)]
    return page_of(session, statement, keys, filters={"schedule": schedule_id}, cursor=cursor, limit=limit, fixed=fixed)


def _fire_times(session: Session, row: ScheduleRow, submit: Submit, moment: datetime) -> list[FiringRow]:
    """Fire a locked schedule for its times from `next_fire_at` to `moment`, and move it on."""
    timetable, first = schedules.timetable_of(row), row.next_fire_at
    if timetable is None or first is None:
        raise AssertionError(f"{row.id} has no timetable and can not be due")
    last = timetable.latest(first, moment)
    late = moment - last > ON_TIME
    runs = row.misfire == "run-once" or not late
    missed = timetable.count(first, last, COUNTED + 2) - runs
    written = []
    if missed:
        written.append(_record_missed(session, row, (first, last), missed, runs, moment))
    if runs:
        detail = f"{moment - last} late" if late else None
        written.append(_fire(session, row, submit, _stamp(last), last, moment, detail))
    row.next_fire_at = timetable.after(moment)
    session.flush()
    return [firing for firing in written if firing is not None]


def _record_missed(
    session: Session, row: ScheduleRow, span: tuple[datetime, datetime], number: int, but_last: bool, moment: datetime
) -> FiringRow | None:
    first, last = span
    many = f"more than {COUNTED}" if number > COUNTED else str(number)
    until = "" if number == 1 else f", before {_stamp(last)}" if but_last else f" to {_stamp(last)}"
    detail = f"{many} missed, from {_stamp(first)}{until}: no server was there to fire"
    # Not under the key of the time itself: if only the clock had gone ahead, that time is still to come.
    return _insert(session, row, f"missed:{_stamp(first)}", first, moment, "missed", detail)


def _fire(
    session: Session,
    row: ScheduleRow,
    submit: Submit,
    occurrence: str,
    due_at: datetime,
    moment: datetime,
    detail: str | None = None,
) -> FiringRow | None:
    """One firing of a locked schedule; None if this occurrence has fired before."""
    firing = _insert(session, row, occurrence, due_at, moment, "job", detail)
    if firing is None:
        return None
    try:
        with session.begin_nested():  # a job that is refused takes with it the cancels that were to make way for it
            running = _unfinished(session, row)
            if running and row.overlap == "skip":
                firing.outcome, firing.detail = "skipped", f"{running[0].id} is {running[0].state}"
            elif fleets.any_open(session, row):
                firing.outcome, firing.detail = "skipped", "adapters of an earlier firing still wait for their jobs"
            elif (selector := fleets.selector_of(row)) is not None:
                firing.outcome = "fleet"
                fleets.write_items(session, firing, selector)
            else:
                _make_way(session, row, running)
                firing.job_id = submit(session, row).id
    except (DatabaseUnavailable, BlobStoreUnavailable, DiskFull):
        raise
    except RankwiseError as error:
        firing.outcome, firing.detail, firing.job_id = "refused", f"{error.code}: {error.detail}", None
    session.flush()
    return firing


def _insert(
    session: Session,
    row: ScheduleRow,
    occurrence: str,
    due_at: datetime,
    moment: datetime,
    outcome: str,
    detail: str | None,
) -> FiringRow | None:
    values = {
        "schedule_id": row.id,
        "occurrence": occurrence,
        "due_at": due_at,
        "outcome": outcome,
        "detail": detail,
        "created_at": moment,
    }
    added = session.scalar(insert_or_ignore(session, FiringRow, values).returning(FiringRow.occurrence))
    return None if added is None else session.get_one(FiringRow, (row.id, occurrence))


def _unfinished(session: Session, row: ScheduleRow) -> list[JobRow]:
    """The schedule's own jobs that have not ended, unless it does not care; the oldest first."""
    if row.overlap == "queue":
        return []
    statement = select(JobRow).where(JobRow.schedule_id == row.id, _UNFINISHED)
    return list(session.scalars(statement.order_by(JobRow.created_at, JobRow.id)))


def _make_way(session: Session, row: ScheduleRow, running: list[JobRow]) -> None:
    """Cancel what the new job replaces."""
    if row.overlap != "replace":
        return
    for job in in_lock_order(running):
        try:
            jobs.request_cancel(session, job.id)
        except StateConflict:
            continue  # it has ended by itself in the meantime


def _waiting_for(session: Session, event: DomainEventRow) -> ScheduleRow | None:
    """The next schedule that this event starts, locked; only those that were there when it happened."""
    fired = exists().where(FiringRow.schedule_id == ScheduleRow.id, FiringRow.occurrence == event.id)
    return session.scalars(
        select(ScheduleRow)
        .where(
            text("schedules.event IS NOT NULL AND schedules.deleted_at IS NULL"),
            ScheduleRow.event == event.type,
            or_(ScheduleRow.subject.is_(None), ScheduleRow.subject == event.subject),
            ScheduleRow.enabled.is_(True),
            ScheduleRow.created_at <= event.created_at,
            ~fired,
        )
        .order_by(ScheduleRow.id)
        .limit(1)
        .with_for_update(of=ScheduleRow)
        .execution_options(populate_existing=True)
    ).one_or_none()


def _stamp(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
