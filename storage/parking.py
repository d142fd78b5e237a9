"""Jobs of a fleet whose window has closed before a device was free: they wait for the next hours of the window.

Parked is a job that may be claimed at a time that never comes. One that has started once goes on at any hour.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ColumnElement, and_, or_, select, update
from sqlalchemy.orm import Session

from storage import database
from storage.conditions import IS_QUEUED, PARKED
from storage.tables import JobRow, ScheduleRow
from storage.windows import Window


def is_due(session: Session, moment: datetime | None = None) -> bool:
    """Whether a job is to be parked or let go."""
    closed = _closed(session, moment or database.now(session))
    wrong = or_(_to_park(closed), _to_release(closed))
    return session.scalar(select(JobRow.id).where(IS_QUEUED, wrong).limit(1)) is not None


def settle(session: Session, moment: datetime | None = None) -> int:
    """Park the jobs whose window is closed, and let those go whose window is open or gone; how many changed."""
    moment = moment or database.now(session)
    closed = _closed(session, moment)
    changed = 0
    for condition, available_at in ((_to_park(closed), PARKED), (_to_release(closed), moment)):
        found = select(JobRow.id).where(IS_QUEUED, condition).order_by(JobRow.id).with_for_update(skip_locked=True)
        chosen = session.scalars(found).all()
        session.execute(update(JobRow).where(JobRow.id.in_(chosen)).values(available_at=available_at))
        changed += len(chosen)
    return changed


def _closed(session: Session, moment: datetime) -> list[str]:
    """The schedules whose jobs may not start now."""
    windows = session.execute(
        select(ScheduleRow.id, ScheduleRow.window).where(
            ScheduleRow.window.is_not(None), ScheduleRow.deleted_at.is_(None)
        )
    )
    return [schedule_id for schedule_id, window in windows if window and not Window.of(window).is_open(moment)]


def _to_park(closed: list[str]) -> ColumnElement[bool]:
    return and_(JobRow.schedule_id.in_(closed), JobRow.attempt == 0, JobRow.available_at < PARKED)


def _to_release(closed: list[str]) -> ColumnElement[bool]:
    return and_(JobRow.available_at == PARKED, JobRow.schedule_id.not_in(closed))
