"""Schedules as rows: what is stored, changed, refused; what fires when, by the moment that the test gives."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from artifacts.errors import (
    DatabaseUnavailable,
    NotFound,
    PreconditionFailed,
    QueueFull,
    RequestInvalid,
    StateConflict,
)
from storage import firings, jobs, schedules
from storage.database import Database
from storage.ids import is_id
from storage.schedules import JobTemplate, Trigger
from storage.tables import FiringRow, JobRow, ScheduleRow

HOURLY = Trigger(cron="0 * * * *", timezone="UTC")
JOB = JobTemplate("merge", {"n": 1}, {"devices": 2})
START = datetime(2026, 5, 4, 10, 30, tzinfo=UTC)


def at(text: str) -> datetime:
    return datetime.fromisoformat(f"2026-05-04T{text}").replace(tzinfo=UTC)


def submit(session: Session, row: ScheduleRow) -> JobRow:
    return jobs.create_job(
        session,
        row.job_kind,
        row.job_params,
        resources=row.job_resources,
        created_by=row.created_by,
        schedule_id=row.id,
    )


def make(database: Database, trigger: Trigger = HOURLY, **options: object) -> str:
    with database.write() as session:
        options = {"moment": START, **options}
        return schedules.create_schedule(session, trigger, JOB, **options).id  # type: ignore[arg-type]


def show(database: Database, schedule_id: str) -> ScheduleRow:
    with database.read() as session:
        return schedules.get_schedule(session, schedule_id)


def fire(database: Database, moment: datetime, limit: int = 1) -> list[FiringRow]:
    with database.write() as session:
        return firings.fire_due(session, submit, limit=limit, moment=moment)


def history(database: Database, schedule_id: str) -> list[tuple[str, str]]:
    """(occurrence, outcome) in the order of writing."""
    with database.read() as session:
        rows = session.scalars(
            select(FiringRow)
            .where(FiringRow.schedule_id == schedule_id)
            .order_by(FiringRow.created_at, FiringRow.occurrence)
        )
        return [(row.occurrence, row.outcome) for row in rows]


def jobs_of(database: Database, schedule_id: str) -> list[JobRow]:
    with database.read() as session:
        rows = session.scalars(select(JobRow).where(JobRow.schedule_id == schedule_id))
        return sorted(rows, key=lambda row: row.id)


def end(database: Database, job_id: str) -> None:
    with database.write() as session:
        jobs.request_cancel(session, job_id)


def test_a_schedule_is_stored_with_its_next_time(database: Database) -> None:
    row = show(database, make(database, name="hourly"))
    assert is_id(row.id, "sch")
    assert (row.name, row.cron, row.timezone, row.event, row.subject) == ("hourly", "0 * * * *", "UTC", None, None)
    assert (row.job_kind, row.job_params, row.job_resources) == ("merge", {"n": 1}, {"devices": 2})
    assert (row.overlap, row.misfire, row.enabled, row.version) == ("skip", "run-once", True, 1)
    assert (row.next_fire_at, row.created_at) == (at("11:00"), START)
    unnamed = show(database, make(database, Trigger(event="base_model.removed")))
    assert (unnamed.name, unnamed.next_fire_at) == ("merge: base_model.removed", None)
    assert show(database, make(database, enabled=False)).next_fire_at is None


@pytest.mark.parametrize(
    ("trigger", "pointer"),
    [
        (Trigger(), "/trigger"),
        (Trigger(cron="* * * * *", event="base_model.removed"), "/trigger"),
        (Trigger(cron="* * * * *", subject="mdl_1"), "/trigger/subject"),
        (Trigger(cron="* * * * *", timezone="Mars/Olympus"), "/trigger/timezone"),
        (Trigger(cron="* * *"), "/trigger/cron"),
        (Trigger(cron="0 0 */31 * MON#2"), "/trigger/cron"),
        (Trigger(event="base_model.born"), "/trigger/event"),
        (Trigger(event="base_model.removed", timezone="UTC"), "/trigger/timezone"),
        (Trigger(event="base_model.removed", subject="mdl_1"), "/trigger/subject"),
        (Trigger(event="base_model.removed", subject="\x00"), "/trigger/subject"),
    ],
)
def test_triggers_that_can_not_be(database: Database, trigger: Trigger, pointer: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        make(database, trigger)
    assert [item.pointer for item in caught.value.errors] == [pointer]


def test_unknown_policies_and_long_names(database: Database) -> None:
    for options in ({"overlap": "wait"}, {"misfire": "always"}, {"name": "x" * 201}, {"name": "a\x00"}):
        with pytest.raises(RequestInvalid):
            make(database, **options)


def test_lists_are_newest_first_without_the_deleted(database: Database) -> None:
    made = [make(database, moment=START + timedelta(minutes=n)) for n in range(4)]
    with database.write() as session:
        schedules.delete_schedule(session, made[1])
    with database.read() as session:
        page = schedules.list_schedules(session, limit=2)
        assert [row.id for row in page.items] == [made[3], made[2]]
        rest = schedules.list_schedules(session, cursor=page.next, limit=2)
        assert [row.id for row in rest.items] == [made[0]]


def test_an_update_counts_versions_and_moves_the_next_time(database: Database) -> None:
    schedule_id = make(database)

    def update(**changes: object) -> ScheduleRow:
        with database.write() as session:
            return schedules.update_schedule(session, schedule_id, moment=at("12:10"), **changes)  # type: ignore[arg-type]

    assert update().version == 1
    assert update(overlap="skip").version == 1, "nothing is different"
    renamed = update(name="new", overlap="queue")
    assert (renamed.version, renamed.next_fire_at) == (2, at("11:00")), "what is due stays due"
    assert (update(enabled=False).next_fire_at, update(enabled=False).version) == (None, 3)
    assert update(enabled=True).next_fire_at == at("13:00"), "what it did not do while it was disabled was not missed"
    moved = update(trigger=Trigger(cron="30 * * * *", timezone="Asia/Kolkata"), job=JobTemplate("merge", {"n": 2}, {}))
    assert (moved.next_fire_at, moved.job_params, moved.job_resources) == (at("13:00"), {"n": 2}, {})
    evented = update(trigger=Trigger(event="base_model.deprecated"))
    assert (evented.cron, evented.timezone, evented.next_fire_at, evented.version) == (None, None, None, 6)
    with pytest.raises(RequestInvalid):
        update(trigger=Trigger(cron="nonsense"))


def test_a_change_applies_to_the_version_that_was_seen(database: Database) -> None:
    schedule_id = make(database)
    with database.write() as session:
        schedules.update_schedule(session, schedule_id, name="two", if_version={1})
    for versions in ({1}, {3, 4}, set()):
        with pytest.raises(PreconditionFailed), database.write() as session:
            schedules.update_schedule(session, schedule_id, name="three", if_version=versions)
        with pytest.raises(PreconditionFailed), database.write() as session:
            schedules.delete_schedule(session, schedule_id, if_version=versions)
    with database.write() as session:
        schedules.delete_schedule(session, schedule_id, if_version={1, 2})


def test_what_is_deleted_is_gone_and_fires_no_more(database: Database) -> None:
    schedule_id = make(database)
    with database.write() as session:
        schedules.delete_schedule(session, schedule_id)
    for call in (schedules.get_schedule, schedules.lock_schedule, schedules.delete_schedule, firings.list_firings):
        for missing in (schedule_id, "sch_1", "\x00"):
            with pytest.raises(NotFound), database.write() as session:
                call(session, missing)
    assert fire(database, at("20:00")) == []


def test_a_firing_makes_one_job_and_moves_on(database: Database) -> None:
    schedule_id = make(database)
    assert fire(database, at("10:59:59")) == []
    with database.read() as session:
        assert not firings.is_due(session, at("10:59:59"))
        assert firings.is_due(session, at("11:00"))
    (firing,) = fire(database, at("11:00:01"))
    (job,) = jobs_of(database, schedule_id)
    assert (firing.occurrence, firing.due_at, firing.outcome, firing.job_id, firing.detail) == (
        "2026-05-04T11:00:00Z", at("11:00"), "job", job.id, None
    )  # fmt: skip
    assert (job.kind, job.params, job.resources, job.state) == ("merge", {"n": 1}, {"devices": 2}, "queued")
    assert show(database, schedule_id).next_fire_at == at("12:00")
    assert show(database, schedule_id).version == 1, "firing is no change"
    assert fire(database, at("11:00:02")) == []


def test_the_longest_due_comes_first(database: Database) -> None:
    late, early = make(database, Trigger(cron="20 * * * *")), make(database, Trigger(cron="10 * * * *"))
    assert [firing.schedule_id for firing in fire(database, at("11:20:30"), 5)] == [early, late]


@pytest.mark.parametrize("seconds", [0, 60])
def test_a_firing_within_a_minute_is_on_time(database: Database, seconds: int) -> None:
    schedule_id = make(database, misfire="skip")
    assert [firing.outcome for firing in fire(database, at("11:00") + timedelta(seconds=seconds))] == ["job"]
    assert len(jobs_of(database, schedule_id)) == 1


def test_down_over_three_firings_and_run_once(database: Database) -> None:
    schedule_id = make(database, misfire="run-once", overlap="queue")
    written = fire(database, at("13:30"))
    assert [(row.occurrence, row.outcome) for row in written] == [
        ("missed:2026-05-04T11:00:00Z", "missed"),
        ("2026-05-04T13:00:00Z", "job"),
    ]
    assert written[0].detail == (
        "2 missed, from 2026-05-04T11:00:00Z, before 2026-05-04T13:00:00Z: no server was there to fire"
    )
    assert written[1].detail == "0:30:00 late"
    assert len(jobs_of(database, schedule_id)) == 1
    assert show(database, schedule_id).next_fire_at == at("14:00")


def test_down_over_three_firings_and_skip(database: Database) -> None:
    schedule_id = make(database, misfire="skip")
    (firing,) = fire(database, at("13:30"))
    assert (firing.outcome, firing.job_id, firing.due_at) == ("missed", None, at("11:00"))
    assert firing.detail == "3 missed, from 2026-05-04T11:00:00Z to 2026-05-04T13:00:00Z: no server was there to fire"
    assert jobs_of(database, schedule_id) == []
    assert show(database, schedule_id).next_fire_at == at("14:00")
    assert [row.outcome for row in fire(database, at("14:00:01"))] == ["job"]


def test_down_over_one_firing(database: Database) -> None:
    once, never = make(database), make(database, misfire="skip")
    fire(database, at("11:20"), 2)
    assert history(database, once) == [("2026-05-04T11:00:00Z", "job")]
    assert history(database, never) == [("missed:2026-05-04T11:00:00Z", "missed")]


def test_the_last_firing_of_a_downtime_may_be_on_time(database: Database) -> None:
    schedule_id = make(database, misfire="skip")
    assert [row.outcome for row in fire(database, at("13:00:20"))] == ["missed", "job"]
    assert len(jobs_of(database, schedule_id)) == 1


def test_a_long_downtime_is_one_row(database: Database) -> None:
    schedule_id = make(database, Trigger(cron="* * * * *"))
    written = fire(database, START + timedelta(days=400))
    assert [row.outcome for row in written] == ["missed", "job"]
    assert str(written[0].detail).startswith("more than 1000 missed")
    assert len(jobs_of(database, schedule_id)) == 1


def test_days_on_which_the_clocks_change(database: Database) -> None:
    """Every day once: at the end of the gap in March, the first of two in October."""
    daily = Trigger(cron="30 2 * * *", timezone="Europe/Berlin")
    for first, fired in (
        ("2026-03-28T12:00", ["2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]),
        ("2026-10-24T12:00", ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]),
    ):
        start = datetime.fromisoformat(first).replace(tzinfo=UTC)
        schedule_id = make(database, daily, overlap="queue", moment=start)
        for minutes in range(0, 36 * 60, 15):
            fire(database, start + timedelta(hours=6, minutes=minutes, seconds=1))
        assert history(database, schedule_id) == [(time, "job") for time in fired]


def test_a_leap_day(database: Database) -> None:
    schedule_id = make(database, Trigger(cron="0 0 29 2 *"))
    assert show(database, schedule_id).next_fire_at == datetime(2028, 2, 29, tzinfo=UTC)
    fire(database, datetime(2028, 2, 29, 0, 0, 5, tzinfo=UTC))
    assert history(database, schedule_id) == [("2028-02-29T00:00:00Z", "job")]
    assert show(database, schedule_id).next_fire_at == datetime(2032, 2, 29, tzinfo=UTC)


def resettle(database: Database, moment: datetime) -> int:
    with database.write() as session:
        return firings.resettle(session, moment=moment)


def test_a_clock_that_goes_ahead_and_back(database: Database) -> None:
    """What has fired does not fire again, and what is still to come is not lost."""
    schedule_id = make(database, overlap="queue")
    fire(database, at("11:00:01"))
    fire(database, at("15:30"))  # the clock is four hours ahead for a moment
    assert show(database, schedule_id).next_fire_at == at("16:00")
    assert resettle(database, at("11:30")) == 1
    assert resettle(database, at("11:30")) == 0
    for hour in range(12, 18):
        fire(database, at(f"{hour}:00:01"))
    assert [row for row in history(database, schedule_id) if row[1] == "job"] == [
        (f"2026-05-04T{hour}:00:00Z", "job") for hour in (11, 12, 13, 14, 15, 16, 17)
    ]
    assert len(jobs_of(database, schedule_id)) == 7


def test_a_clock_that_goes_back_over_a_firing(database: Database) -> None:
    schedule_id = make(database, overlap="queue")
    fire(database, at("11:00:01"))
    assert resettle(database, at("10:59:50")) == 1
    assert show(database, schedule_id).next_fire_at == at("11:00")
    assert fire(database, at("11:00:01")) == []
    assert show(database, schedule_id).next_fire_at == at("12:00")
    assert len(jobs_of(database, schedule_id)) == 1


def test_settling_leaves_alone_what_is_due_disabled_or_right(database: Database) -> None:
    due, disabled, event = (
        make(database),
        make(database, enabled=False),
        make(database, Trigger(event="base_model.removed")),
    )
    assert resettle(database, at("12:30")) == 0
    assert resettle(database, at("10:45")) == 0
    assert [show(database, key).next_fire_at for key in (due, disabled, event)] == [at("11:00"), None, None]


def test_overlap_skip(database: Database) -> None:
    schedule_id, other = make(database), make(database)
    fire(database, at("11:00:01"), 2)
    (job,) = jobs_of(database, schedule_id)
    end(database, jobs_of(database, other)[0].id)
    skipped, fired = sorted(fire(database, at("12:00:01"), 2), key=lambda row: row.outcome, reverse=True)
    assert (skipped.schedule_id, skipped.outcome, skipped.detail) == (schedule_id, "skipped", f"{job.id} is queued")
    assert (fired.schedule_id, fired.outcome) == (other, "job"), "only its own jobs count"
    end(database, job.id)
    assert [row.outcome for row in fire(database, at("13:00:01"))] == ["job"]


def test_overlap_queue(database: Database) -> None:
    schedule_id = make(database, overlap="queue")
    for hour in (11, 12, 13):
        fire(database, at(f"{hour}:00:01"))
    assert [job.state for job in jobs_of(database, schedule_id)] == ["queued"] * 3


def test_overlap_replace(database: Database) -> None:
    schedule_id = make(database, overlap="replace")
    fire(database, at("11:00:01"))
    fire(database, at("12:00:01"))
    assert [job.state for job in jobs_of(database, schedule_id)] == ["cancelled", "queued"]
    assert {row for _, row in history(database, schedule_id)} == {"job"}


def refuse(error: Exception) -> Callable[[Session, ScheduleRow], JobRow]:
    def submit_badly(session: Session, row: ScheduleRow) -> JobRow:
        submit(session, row)
        raise error

    return submit_badly


def test_a_refused_job_is_told_and_the_schedule_goes_on(database: Database) -> None:
    schedule_id = make(database, overlap="replace")
    fire(database, at("11:00:01"))
    with database.write() as session:
        (firing,) = firings.fire_due(session, refuse(QueueFull("1000 jobs are waiting")), moment=at("12:00:01"))
    assert (firing.outcome, firing.detail, firing.job_id) == ("refused", "queue_full: 1000 jobs are waiting", None)
    (job,) = jobs_of(database, schedule_id)
    assert job.state == "queued", "nothing is cancelled for a job that can not be made"
    assert history(database, schedule_id)[1] == ("2026-05-04T12:00:00Z", "refused")
    assert [row.outcome for row in fire(database, at("13:00:01"))] == ["job"]


def test_a_database_that_goes_away_leaves_the_firing_due(database: Database) -> None:
    schedule_id = make(database)
    with pytest.raises(DatabaseUnavailable), database.write() as session:
        firings.fire_due(session, refuse(DatabaseUnavailable("gone")), moment=at("11:00:01"))
    assert (history(database, schedule_id), jobs_of(database, schedule_id)) == ([], [])
    assert [row.outcome for row in fire(database, at("11:00:05"))] == ["job"]


def trigger(database: Database, schedule_id: str, moment: datetime = START) -> JobRow:
    with database.write() as session:
        firing = firings.trigger_now(session, schedule_id, submit, moment=moment)
        return jobs.get_job(session, str(firing.job_id))


def test_trigger_now(database: Database) -> None:
    schedule_id = make(database, enabled=False)
    job = trigger(database, schedule_id)
    (entry,) = history(database, schedule_id)
    assert is_id(entry[0], "trg")
    with database.read() as session:
        (firing,) = firings.list_firings(session, schedule_id).items
    assert (firing.outcome, firing.job_id) == ("job", job.id)
    with pytest.raises(StateConflict, match=job.id):
        trigger(database, schedule_id)
    assert len(history(database, schedule_id)) == 1
    with database.write() as session:
        schedules.update_schedule(session, schedule_id, overlap="replace", enabled=True, moment=START)
    trigger(database, schedule_id)
    assert [row.state for row in jobs_of(database, schedule_id)] == ["cancelled", "queued"]
    assert show(database, schedule_id).next_fire_at == at("11:00"), "its times stay"
    with pytest.raises(QueueFull), database.write() as session:
        firings.trigger_now(session, schedule_id, refuse(QueueFull("full")))
    assert [row.state for row in jobs_of(database, schedule_id)] == ["cancelled", "queued"]


def test_firings_page(database: Database) -> None:
    schedule_id, other = make(database, overlap="queue"), make(database, overlap="queue")
    for hour in (11, 12, 13):
        fire(database, at(f"{hour}:00:01"), 2)
    with database.read() as session:
        page = firings.list_firings(session, schedule_id, limit=2)
        assert [row.due_at for row in page.items] == [at("13:00"), at("12:00")]
        rest = firings.list_firings(session, schedule_id, cursor=page.next, limit=2)
        assert [row.due_at for row in rest.items] == [at("11:00")]
        with pytest.raises(RequestInvalid):
            firings.list_firings(session, other, cursor=page.next)
