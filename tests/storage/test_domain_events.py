"""Domain events: when they are published, and the schedules that they start."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from artifacts.base_model import BaseModelRef
from storage import database as clock
from storage import domain_events, firings, jobs, models, retirement, schedules
from storage.database import Database
from storage.schedules import JobTemplate, Trigger
from storage.tables import DomainEventRow, FiringRow, JobRow, ScheduleRow

JOB = JobTemplate("merge", {"n": 1}, {})
START = datetime(2026, 5, 4, 10, 30, tzinfo=UTC)


def submit(session: Session, row: ScheduleRow) -> JobRow:
    return jobs.create_job(session, row.job_kind, row.job_params, schedule_id=row.id)


def make(database: Database, trigger: Trigger, **options: object) -> str:
    with database.write() as session:
        return schedules.create_schedule(session, trigger, JOB, **options).id  # type: ignore[arg-type]


def jobs_of(database: Database, schedule_id: str) -> list[JobRow]:
    with database.read() as session:
        return list(session.scalars(select(JobRow).where(JobRow.schedule_id == schedule_id)))


EVENT = Trigger(event="base_model.deprecated")


def add_model(database: Database, name: str) -> str:
    with database.write() as session:
        return models.add_model(session, BaseModelRef.named(name))[0].id


def deprecate(database: Database, model_id: str, **dates: datetime | None) -> None:
    with database.write() as session:
        retirement.update_model(session, model_id, **(dates or {"deprecated_at": START}))


def fire_events(database: Database) -> list[FiringRow]:
    found = []
    while True:
        with database.write() as session:
            firing = firings.fire_event(session, submit)
        if firing is None:
            return found
        found.append(firing)


def test_a_date_that_was_not_set_before_is_an_event(database: Database) -> None:
    model = add_model(database, "acme/tiny")
    deprecate(database, model)
    deprecate(database, model, deprecated_at=START + timedelta(days=1))
    deprecate(database, model, removed_at=START, deprecated_at=None)
    with database.read() as session:
        events = session.scalars(select(DomainEventRow).order_by(DomainEventRow.id)).all()
        assert domain_events.any_open(session)
    assert [(event.type, event.subject, event.data) for event in events] == [
        ("base_model.registered", model, {"name": "acme/tiny"}),
        ("base_model.deprecated", model, {"name": "acme/tiny", "deprecated_at": START.isoformat()}),
        ("base_model.removed", model, {"name": "acme/tiny", "removed_at": START.isoformat()}),
    ]
    with pytest.raises(RuntimeError), database.write() as session:
        retirement.update_model(session, model, deprecated_at=START)
        raise RuntimeError("the request failed afterwards")
    with database.read() as session:
        assert len(session.scalars(select(DomainEventRow)).all()) == 3
    with pytest.raises(AssertionError), database.write() as session:
        domain_events.publish(session, "base_model.born", model, {})


def test_an_event_fires_each_schedule_that_waits_for_it_once(database: Database) -> None:
    model, other = add_model(database, "acme/tiny"), add_model(database, "acme/other")
    every, own = make(database, EVENT), make(database, Trigger(event=EVENT.event, subject=model))
    for silent in (
        Trigger(event=EVENT.event, subject=other),
        Trigger(event="base_model.removed"),
        Trigger(cron="0 0 1 1 *"),
    ):
        make(database, silent)
    make(database, EVENT, enabled=False)
    with database.write() as session:
        schedules.delete_schedule(session, make_in(session))
    deprecate(database, model)
    with database.read() as session:
        later = clock.now(session) + timedelta(seconds=1)
    make(database, EVENT, moment=later)  # made afterwards: the event is not for it
    fired = fire_events(database)
    assert sorted(row.schedule_id for row in fired) == sorted([every, own])
    assert {(row.outcome, row.occurrence[:4]) for row in fired} == {("job", "evt_")}
    assert fire_events(database) == []
    with database.read() as session:
        assert not domain_events.any_open(session)
    assert [len(jobs_of(database, key)) for key in (every, own)] == [1, 1]


def make_in(session: Session) -> str:
    return schedules.create_schedule(session, EVENT, JOB).id


def test_every_event_counts(database: Database) -> None:
    schedule_id = make(database, EVENT, overlap="queue")
    for name in ("a/a", "a/b", "a/c"):
        deprecate(database, add_model(database, name))
    assert len(fire_events(database)) == 3
    assert len(jobs_of(database, schedule_id)) == 3


def test_events_that_nobody_waits_for_are_closed(database: Database) -> None:
    for name in ("a/a", "a/b"):
        deprecate(database, add_model(database, name))
    assert fire_events(database) == []
    with database.read() as session:
        assert not domain_events.any_open(session)
