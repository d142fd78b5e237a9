"""Looking for what is to fire uses an index, on both databases."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from sqlalchemy import event
from sqlalchemy.orm import Session

from storage import domain_events, firings, jobs, schedules
from storage.database import Database
from storage.schedules import JobTemplate, Trigger
from storage.tables import JobRow, ScheduleRow

JOB = JobTemplate("merge", {"n": 1}, {})
START = datetime(2026, 5, 4, 10, 30, tzinfo=UTC)


def submit(session: Session, row: ScheduleRow) -> JobRow:
    return jobs.create_job(session, row.job_kind, row.job_params, schedule_id=row.id)


def make(database: Database, trigger: Trigger, **options: object) -> str:
    with database.write() as session:
        return schedules.create_schedule(session, trigger, JOB, **options).id  # type: ignore[arg-type]


def plans(database: Database, act: Callable[[Session], object]) -> list[str]:
    """How the database would run each query of `act`; PostgreSQL as if the tables were large."""
    seen: list[tuple[str, object]] = []

    def note(connection: object, cursor: object, statement: str, parameters: object, *rest: object) -> None:
        if statement.startswith("SELECT") and "FROM " in statement:
            seen.append((statement, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        with database.write() as session:
            act(session)
    finally:
        event.remove(database.engine, "before_cursor_execute", note)
    found = []
    with database.engine.connect() as connection:
        if not database.is_sqlite:
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        explain = "EXPLAIN QUERY PLAN" if database.is_sqlite else "EXPLAIN"
        for statement, parameters in seen:
            rows = connection.exec_driver_sql(f"{explain} {statement}", parameters)  # type: ignore[arg-type]
            found.append(" ".join(str(row[-1]) for row in rows))
    return found


def test_nothing_is_searched_for_without_an_index(database: Database) -> None:
    schedule_id = make(database, Trigger(cron="0 * * * *"), moment=START)
    hour = timedelta(hours=1)
    with database.write() as session:
        firings.fire_due(session, submit, moment=START + hour)
    for act, index in (
        (firings.is_due, "ix_schedules_due"),
        (lambda session: firings.fire_due(session, submit, moment=START), "ix_schedules_due"),
        (domain_events.any_open, "ix_domain_events_open"),
        (lambda session: firings.list_firings(session, schedule_id, limit=1), "ix_schedule_firings_created"),
        (schedules.list_schedules, "ix_schedules_created"),
        (lambda session: firings.fire_due(session, submit, moment=START + 2 * hour), "ix_jobs_schedule"),
    ):
        found = plans(database, act)
        assert any(index in plan for plan in found), (index, found)
