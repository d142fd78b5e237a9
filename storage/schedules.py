"""Schedules: what is to be run when. How they fire is in storage/firings.py."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from artifacts.errors import FieldError, NotFound, PreconditionFailed, RequestInvalid
from storage import database
from storage.domain_events import EVENT_TYPES
from storage.ids import new_id
from storage.pagination import DEFAULT_LIMIT, Page, page_of
from storage.tables import ModelRow, ScheduleRow
from storage.text import is_storable, storable
from storage.timetable import Timetable
from storage.windows import Window

OVERLAPS = ("skip", "queue", "replace")
MISFIRES = ("run-once", "skip")
DEFAULT_TIMEZONE = "UTC"
DEFAULT_PARALLEL = 8
NAME_LIMIT = 200


@dataclass(frozen=True, slots=True)
class Trigger:
    """When a schedule fires: by `cron` in `timezone` (UTC unless given), or at every `event` (of one `subject`)."""

    cron: str | None = None
    timezone: str | None = None
    event: str | None = None
    subject: str | None = None


@dataclass(frozen=True, slots=True)
class JobTemplate:
    """The job that every firing makes; with a `selector`, one for each adapter that matches (`storage.selectors`)."""

    kind: str
    params: Mapping[str, Any]
    resources: Mapping[str, Any]
    selector: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Pace:
    """How a fleet's jobs start.

    Attributes:
        max_parallel: how many may be unfinished at once; None: `DEFAULT_PARALLEL`.
        window: {from, to, timezone}, hours of the day in which they may start; None: always. Without `timezone` it is
            the trigger's, or UTC.
    """

    max_parallel: int | None = None
    window: Mapping[str, Any] | None = None


def create_schedule(
    session: Session,
    trigger: Trigger,
    job: JobTemplate,
    *,
    name: str | None = None,
    overlap: str = "skip",
    misfire: str = "run-once",
    enabled: bool = True,
    pace: Pace | None = None,
    created_by: str | None = None,
    moment: datetime | None = None,
) -> ScheduleRow:
    """A new schedule. It first fires at the first time after `moment` (None: the database's clock).

    Args:
        name: None: made of the job's kind and the trigger.
        overlap: what a firing does while a job of an earlier one is unfinished: "skip" it, "queue" one more job, or
            "replace" that job.
        misfire: what comes of firings that no server was there to see: "run-once" or "skip".
        created_by: the API key that owns its jobs.

    Raises:
        RequestInvalid: a trigger that is neither of both kinds, can not be read or would never fire; an unknown policy.
    """
    moment = moment or database.now(session)
    row = ScheduleRow(
        id=new_id("sch"),
        overlap=_one_of(overlap, OVERLAPS, "/overlap"),
        misfire=_one_of(misfire, MISFIRES, "/misfire"),
        enabled=enabled,
        version=1,
        created_by=created_by,
        created_at=moment,
        updated_at=moment,
    )
    _set_trigger(session, row, trigger, moment)
    _set_job(row, job)
    _set_pace(row, pace or Pace())
    _check_fleet(row)
    row.name = storable(name or f"{job.kind}: {row.cron or row.event}"[:NAME_LIMIT], "/name", NAME_LIMIT)
    row.next_fire_at = next_fire_at(row, moment)
    session.add(row)
    session.flush()
    return row


def get_schedule(session: Session, schedule_id: str) -> ScheduleRow:
    """Raises NotFound, also for a deleted one."""
    row = session.get(ScheduleRow, schedule_id) if is_storable(schedule_id) else None
    return _present(row, schedule_id)


def lock_schedule(session: Session, schedule_id: str) -> ScheduleRow:
    """The schedule as it is now, locked until the transaction ends. Raises NotFound."""
    row = None
    if is_storable(schedule_id):
        row = session.get(ScheduleRow, schedule_id, with_for_update=True, populate_existing=True)
    return _present(row, schedule_id)


def list_schedules(session: Session, cursor: str | None = None, limit: int = DEFAULT_LIMIT) -> Page[ScheduleRow]:
    """Newest first.

    Raises:
        RequestInvalid: a bad cursor or limit.
    """
    statement = select(ScheduleRow).where(text("schedules.deleted_at IS NULL"))
    return page_of(session, statement, (ScheduleRow.created_at, ScheduleRow.id), filters={}, cursor=cursor, limit=limit)


def update_schedule(
    session: Session,
    schedule_id: str,
    *,
    name: str | None = None,
    trigger: Trigger | None = None,
    job: JobTemplate | None = None,
    overlap: str | None = None,
    misfire: str | None = None,
    enabled: bool | None = None,
    max_parallel: int | None = None,
    window: Mapping[str, Any] | None = None,
    unset: Collection[str] = (),
    if_version: Collection[int] | None = None,
    moment: datetime | None = None,
) -> ScheduleRow:
    """Change what is not None; `version` grows by one if anything is different afterwards.

    With another trigger, or enabled again, the schedule next fires at the first time after `moment` (None: the
    database's clock): what it did not do while it was disabled was not missed.

    Args:
        unset: max_parallel, window: to be what they are if nobody gives them.
        if_version: change it only if its version is one of these.

    Raises:
        NotFound, PreconditionFailed
        RequestInvalid: see `create_schedule`.
    """
    row = lock_schedule(session, schedule_id)
    _check_version(row, if_version)
    moment = moment or database.now(session)
    before = _definition(row)
    if name is not None:
        row.name = storable(name, "/name", NAME_LIMIT)
    if trigger is not None:
        _set_trigger(session, row, trigger, moment)
    if job is not None:
        _set_job(row, job)
    if overlap is not None:
        row.overlap = _one_of(overlap, OVERLAPS, "/overlap")
    if misfire is not None:
        row.misfire = _one_of(misfire, MISFIRES, "/misfire")
    if enabled is not None:
        row.enabled = enabled
    if job is not None and job.selector is None:
        row.max_parallel = row.window = None  # a fleet's
    for field in unset:
        setattr(row, field, None)
    _set_pace(row, Pace(max_parallel or row.max_parallel, window or row.window))
    _check_fleet(row)
    after = _definition(row)
    if after != before:
        row.version += 1
        row.updated_at = moment
    if [after[field] for field in _TIMING] != [before[field] for field in _TIMING]:
        row.next_fire_at = next_fire_at(row, moment)
    session.flush()
    return row


def delete_schedule(
    session: Session, schedule_id: str, *, if_version: Collection[int] | None = None, moment: datetime | None = None
) -> None:
    """It fires no more; its jobs and firings stay.

    Raises:
        NotFound, PreconditionFailed
    """
    row = lock_schedule(session, schedule_id)
    _check_version(row, if_version)
    row.deleted_at = moment or database.now(session)
    row.next_fire_at = None
    session.flush()


def timetable_of(row: ScheduleRow) -> Timetable | None:
    """When it fires; None if events start it."""
    return None if row.cron is None or row.timezone is None else Timetable(row.cron, row.timezone)


def next_fire_at(row: ScheduleRow, moment: datetime) -> datetime | None:
    """When it next fires after `moment`; None while it is disabled, and if events start it."""
    timetable = timetable_of(row)
    return timetable.after(moment) if timetable is not None and row.enabled and row.deleted_at is None else None


_TIMING = ("cron", "timezone", "enabled")
_JOB = ("job_kind", "job_params", "job_resources", "job_selector", "max_parallel", "window")
_DEFINITION = (*_TIMING, *_JOB, "name", "event", "subject", "overlap", "misfire")


def _definition(row: ScheduleRow) -> dict[str, Any]:
    return {field: getattr(row, field) for field in _DEFINITION}


def _present(row: ScheduleRow | None, schedule_id: str) -> ScheduleRow:
    if row is None or row.deleted_at is not None:
        raise NotFound(f"there is no schedule {schedule_id!r}", hint="GET /schedules lists what is here.")
    return row


def _check_version(row: ScheduleRow, expected: Collection[int] | None) -> None:
    if expected is not None and row.version not in expected:
        raise PreconditionFailed(
            f"schedule {row.id} is at version {row.version}, which If-Match does not name",
            hint="Read it again, and repeat the change on what it is now.",
        )


def _set_trigger(session: Session, row: ScheduleRow, trigger: Trigger, moment: datetime) -> None:
    if (trigger.cron is None) == (trigger.event is None):
        raise _invalid("/trigger", "needs either cron or event")
    if trigger.cron is not None:
        if trigger.subject is not None:
            raise _invalid("/trigger/subject", "belongs to event, not to cron")
        timetable = Timetable(trigger.cron, trigger.timezone or DEFAULT_TIMEZONE)
        if timetable.after(moment) is None:
            raise _invalid("/trigger/cron", f"{timetable.cron!r} never fires")
        row.cron, row.timezone = timetable.cron, timetable.zone.key
        row.event = row.subject = None
        return
    if trigger.timezone is not None:
        raise _invalid("/trigger/timezone", "belongs to cron, not to event")
    row.event = _one_of(str(trigger.event), EVENT_TYPES, "/trigger/event")
    row.subject = trigger.subject
    if row.subject is not None and (not is_storable(row.subject) or session.get(ModelRow, row.subject) is None):
        raise _invalid("/trigger/subject", f"there is no base model {row.subject!r}")
    row.cron = row.timezone = None


def _set_job(row: ScheduleRow, job: JobTemplate) -> None:
    row.job_kind = storable(job.kind, "/job/kind", 24)
    row.job_params, row.job_resources = dict(job.params), dict(job.resources)
    row.job_selector = None if job.selector is None else dict(job.selector)


def _set_pace(row: ScheduleRow, pace: Pace) -> None:
    row.max_parallel, row.window = pace.max_parallel, None
    if pace.window is not None:
        zone = pace.window.get("timezone") or row.timezone or DEFAULT_TIMEZONE
        row.window = Window.parse(pace.window["from"], pace.window["to"], zone).document()


def _check_fleet(row: ScheduleRow) -> None:
    """A fleet never overlaps with itself, and only a fleet has a pace."""
    if row.job_selector is not None and row.max_parallel is None:
        row.max_parallel = DEFAULT_PARALLEL
    if row.job_selector is not None and row.overlap != "skip":
        raise _invalid(
            "/overlap", "must be skip for a schedule with a selector: two fleets would move the same adapters"
        )
    for name in ("max_parallel", "window"):
        if row.job_selector is None and getattr(row, name) is not None:
            raise _invalid(f"/{name}", "belongs to a job with a selector")


def _one_of(value: str, allowed: tuple[str, ...], pointer: str) -> str:
    if value not in allowed:
        raise _invalid(pointer, f"must be one of {', '.join(allowed)}, not {value[:40]!r}")
    return value


def _invalid(pointer: str, problem: str) -> RequestInvalid:
    return RequestInvalid(f"{pointer} {problem}", errors=[FieldError(pointer, problem)])
