"""Several servers fire at once, as processes of their own: one job for each firing, on both databases."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier

import pytest
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from artifacts.base_model import BaseModelRef
from artifacts.errors import StateConflict
from storage import firings, jobs, models, retirement, schedules
from storage.database import Database
from storage.schedules import JobTemplate, Trigger
from storage.tables import FiringRow, JobRow, ScheduleRow

START = datetime(2026, 5, 4, 10, 0, tzinfo=UTC)
SCHEDULES = 6
MINUTES = 8
SERVERS = 3
JOB = JobTemplate("merge", {}, {})
DEADLINE = 60.0
OCCURRENCES = [f"2026-05-04T10:{minute:02}:00Z" for minute in range(1, MINUTES + 1)]


def submit(session: Session, row: ScheduleRow) -> JobRow:
    return jobs.create_job(session, row.job_kind, row.job_params, schedule_id=row.id)


def make(database: Database, trigger: Trigger, number: int, overlap: str = "queue") -> list[str]:
    with database.write() as session:
        return [
            schedules.create_schedule(session, trigger, JOB, overlap=overlap, moment=START).id for _ in range(number)
        ]


def fire_every_minute(database: Database, gate: Barrier | threading.Barrier, *, settling: bool = False) -> int:
    """At every minute at the same instant as all others; returns how many firings were this server's.

    With `settling`, every server first finds its clock to have gone back by a second.
    """
    fired = 0
    for minute in range(1, MINUTES + 1):
        moment = START + timedelta(minutes=minute)
        gate.wait(DEADLINE)
        if settling:
            with database.write() as session:
                firings.resettle(session, moment=moment - timedelta(seconds=1))
        while True:
            with database.read() as session:
                if not firings.is_due(session, moment):
                    break
            with database.write() as session:
                fired += len(firings.fire_due(session, submit, moment=moment))
    return fired


def _serve(url: str, gate: Barrier, answers: SimpleQueue[int]) -> None:
    database = Database(url)
    answers.put(fire_every_minute(database, gate))
    database.dispose()


def assert_each_fired_once(database: Database, made: list[str], occurrences: list[str]) -> None:
    with database.read() as session:
        written = session.scalars(select(FiringRow)).all()
        made_jobs = Counter(session.scalars(select(JobRow.schedule_id)))
    assert {row.outcome for row in written} == {"job"}
    assert sorted((row.schedule_id, row.occurrence) for row in written) == sorted(
        (key, occurrence) for key in made for occurrence in occurrences
    )
    assert made_jobs == dict.fromkeys(made, len(occurrences))
    assert len({row.job_id for row in written}) == len(written)


def test_processes_fire_each_time_once(database: Database, processes: ForkServerContext) -> None:
    made = make(database, Trigger(cron="* * * * *"), SCHEDULES)
    url = database.url.render_as_string(hide_password=False)
    gate, answers = processes.Barrier(SERVERS), processes.SimpleQueue()
    servers = [processes.Process(target=_serve, args=(url, gate, answers), daemon=True) for _ in range(SERVERS)]
    for server in servers:
        server.start()
    for server in servers:
        server.join(DEADLINE)
    assert [server.exitcode for server in servers] == [0] * SERVERS
    assert sum(answers.get() for _ in servers) == SCHEDULES * MINUTES
    assert_each_fired_once(database, made, OCCURRENCES)


def run_threads(number: int, work: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert failures == []


def test_settling_beside_firing_makes_nothing_fire_twice(database: Database) -> None:
    made = make(database, Trigger(cron="* * * * *"), SCHEDULES)
    gate = threading.Barrier(SERVERS)
    run_threads(SERVERS, lambda: fire_every_minute(database, gate, settling=True))
    assert_each_fired_once(database, made, OCCURRENCES)


def test_an_event_fires_each_schedule_once_on_many_servers(database: Database) -> None:
    with database.write() as session:
        made = [
            schedules.create_schedule(session, Trigger(event="base_model.deprecated"), JOB, overlap="queue").id
            for _ in range(SCHEDULES)
        ]
        model, _ = models.add_model(session, BaseModelRef.named("acme/tiny"))
        retirement.update_model(session, model.id, deprecated_at=START)

    def serve() -> None:
        while True:
            with database.write() as session:
                if firings.fire_event(session, submit) is None:
                    return

    run_threads(SERVERS, serve)
    serve()  # a server that found the event in another's hands comes back a moment later
    with database.read() as session:
        (occurrence,) = set(session.scalars(select(FiringRow.occurrence)))
    assert_each_fired_once(database, made, [occurrence])


@pytest.mark.parametrize("round_", range(3))
def test_two_triggers_at_once_have_one_job_under_skip(database: Database, round_: int) -> None:
    (schedule_id,) = make(database, Trigger(cron="0 0 1 1 *"), 1, overlap="skip")
    outcomes: list[str] = []
    gate = threading.Barrier(2)

    def trigger() -> None:
        gate.wait(DEADLINE)
        try:
            with database.write() as session:
                firings.trigger_now(session, schedule_id, submit)
            outcomes.append("job")
        except StateConflict:
            outcomes.append("conflict")

    run_threads(2, trigger)
    assert sorted(outcomes) == ["conflict", "job"]


@pytest.mark.postgres
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_what_another_server_has_in_hand_is_passed_over(database: Database) -> None:
    """Not waited for: the others that are due fire at once."""
    made = make(database, Trigger(cron="* * * * *"), 2) + make(database, Trigger(event="base_model.deprecated"), 1)
    with database.write() as session:
        model, _ = models.add_model(session, BaseModelRef.named("acme/tiny"))
        retirement.update_model(session, model.id, deprecated_at=START)
    moment = START + timedelta(minutes=1)
    with database.write() as other:
        (held,) = firings.fire_due(other, submit, moment=moment)
        firings.fire_event(other, submit, moment=moment)
        with database.write() as session:
            session.execute(text("SET LOCAL lock_timeout = '1s'"))
            (fired,) = firings.fire_due(session, submit_nothing, limit=5, moment=moment)
            assert {held.schedule_id, fired.schedule_id} == set(made[:2])
            assert firings.fire_event(session, submit_nothing, moment=moment) is None


def submit_nothing(session: Session, row: ScheduleRow) -> JobRow:
    """A job would wait for the counters of the queue, which belong to the other transaction."""
    raise StateConflict("not now")


@pytest.mark.postgres
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
def test_settling_does_not_undo_a_firing_in_between(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    (schedule_id,) = make(database, Trigger(cron="0 * * * *"), 1)
    with database.write() as session:
        session.execute(update(ScheduleRow).values(next_fire_at=START + timedelta(days=1)))
    real = schedules.next_fire_at

    def fire_in_between(row: ScheduleRow, moment: datetime) -> datetime | None:
        monkeypatch.setattr(schedules, "next_fire_at", real)
        with database.write() as other:
            firings.fire_due(other, submit, moment=START + timedelta(days=1))
        return real(row, moment)

    monkeypatch.setattr(schedules, "next_fire_at", fire_in_between)
    with database.write() as session:
        assert firings.resettle(session, moment=START) == 0
    with database.read() as session:
        assert schedules.get_schedule(session, schedule_id).next_fire_at == START + timedelta(days=1, hours=1)
