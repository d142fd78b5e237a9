"""Fleets: one job for each adapter and firing, whoever is killed when, and at the schedule's pace."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from artifacts.base_model import BaseModelRef
from artifacts.errors import NotFound, QueueFull, RequestInvalid, StateConflict
from artifacts.manifest import AdapterManifest
from storage import adapters, claims, firings, fleets, jobs, models, outlook, parking, retirement, schedules
from storage.database import Database
from storage.fleets import MadeJob
from storage.ids import new_id
from storage.retirement import Retirement
from storage.schedules import JobTemplate, Pace, Trigger
from storage.tables import FiringItemRow, FiringRow, JobRow, ScheduleRow
from storage.windows import Window

START = datetime(2026, 5, 4, 10, 30, tzinfo=UTC)
NOON = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)
DAILY = Trigger(cron="0 12 * * *")
ADAPTERS = 5
Make = Callable[..., AdapterManifest]


@pytest.fixture
def base(database: Database, make_manifest: Make) -> str:
    """A base model with five adapters, and a sixth of another one."""
    with database.write() as session:
        found = models.add_model(session, BaseModelRef.named("acme/old"))[0].id
        models.add_model(session, BaseModelRef.named("acme/new"))
        for number in range(ADAPTERS + 1):
            manifest = make_manifest(f"a{number}", base_model="acme/other")
            options = {"model_id": found, "tags": ["live"] if number else []} if number < ADAPTERS else {}
            adapters.add_adapter(session, manifest, name=f"Orders {number}", **options)
    return found


def make(database: Database, base: str, trigger: Trigger = DAILY, **options: Any) -> str:
    selector = {"base_model": base, **options.pop("selector", {})}
    job = JobTemplate("transfer", {"target_model": "acme/new"}, {}, selector)
    with database.write() as session:
        return schedules.create_schedule(session, trigger, job, moment=START, **options).id


def submit(session: Session, row: ScheduleRow, adapter_id: str) -> MadeJob:
    params = {**row.job_params, "adapter": adapter_id}
    return MadeJob(jobs.create_job(session, row.job_kind, params, schedule_id=row.id), True)


def no_job(session: Session, row: ScheduleRow) -> JobRow:
    raise AssertionError("a fleet has no job of its own")


def fire(database: Database, moment: datetime) -> list[FiringRow]:
    with database.write() as session:
        return firings.fire_due(session, no_job, moment=moment)


def feed(database: Database, moment: datetime = NOON, submit: Any = submit) -> int:
    """Make jobs until none can be made now; how many items were settled."""
    settled = 0
    while True:
        with database.read() as session:
            ready = fleets.ready(session, moment)
        found = 0
        for schedule_id in ready:
            with database.write() as session:
                found += fleets.feed(session, schedule_id, submit, moment=moment) is not None
        settled += found
        if not found:
            return settled


def end(database: Database, number: int = 100) -> None:
    with database.write() as session:
        unfinished = session.scalars(select(JobRow.id).where(JobRow.state == "queued").limit(number)).all()
        for job_id in unfinished:
            jobs.request_cancel(session, job_id)


def items(database: Database) -> list[FiringItemRow]:
    with database.read() as session:
        return list(session.scalars(select(FiringItemRow).order_by(FiringItemRow.adapter_id)))


def moved(database: Database) -> Counter[str]:
    """Adapter → how many jobs were made for it."""
    with database.read() as session:
        return Counter(job.params["adapter"] for job in session.scalars(select(JobRow)))


def test_a_firing_makes_one_job_for_each_adapter(database: Database, base: str) -> None:
    schedule_id = make(database, base)
    (firing,) = fire(database, NOON)
    assert (firing.outcome, firing.job_id, firing.detail) == ("fleet", None, None)
    assert [item.state for item in items(database)] == ["pending"] * ADAPTERS
    assert feed(database) == ADAPTERS
    assert sorted(moved(database).values()) == [1] * ADAPTERS
    assert {item.adapter_name for item in items(database)} == {f"Orders {number}" for number in range(ADAPTERS)}
    with database.read() as session:
        figures = fleets.figures(session, fleets.get_firing(session, schedule_id, firing.occurrence))
        assert (figures.total, figures.states, figures.finished) == (ADAPTERS, {"queued": ADAPTERS}, False)
        first = fleets.list_items(session, firing, limit=3)
        rest = fleets.list_items(session, firing, cursor=first.next, limit=3)
        assert len({item.adapter_id for item in (*first.items, *rest.items)}) == ADAPTERS
        with pytest.raises(NotFound):
            fleets.get_firing(session, schedule_id, "never")


def test_a_server_that_dies_between_two_jobs_loses_none_and_doubles_none(database: Database, base: str) -> None:
    make(database, base)
    fire(database, NOON)
    made = 0

    def dying(session: Session, row: ScheduleRow, adapter_id: str) -> MadeJob:
        nonlocal made
        found = submit(session, row, adapter_id)
        made += 1
        if made % 2 == 0:
            raise ConnectionError("killed after the job was written, before the commit")
        return found

    deaths = 0
    while True:
        try:
            settled = feed(database, submit=dying)
        except ConnectionError:
            deaths += 1
            continue
        assert settled in (0, 1)
        break
    assert deaths == ADAPTERS - 1
    assert sorted(moved(database).values()) == [1] * ADAPTERS
    assert {item.state for item in items(database)} == {"job"}


def test_many_servers_share_the_work_and_fire_once(database: Database, base: str) -> None:
    make(database, base)
    gate = threading.Barrier(3)
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            for day in range(2):
                moment = NOON + timedelta(days=day)
                gate.wait(60)
                fire(database, moment)
                feed(database, moment)
                gate.wait(60)
                fire(database, moment)
                feed(database, moment)
                if gate.wait(60) == 0:
                    end(database)
                gate.wait(60)
        except BaseException as error:
            failures.append(error)
            gate.abort()

    servers = [threading.Thread(target=serve) for _ in range(3)]
    for server in servers:
        server.start()
    for server in servers:
        server.join(120)
    assert failures == []
    assert sorted(moved(database).values()) == [2] * ADAPTERS
    assert len(items(database)) == 2 * ADAPTERS


def test_no_more_jobs_than_may_run_at_once(database: Database, base: str) -> None:
    make(database, base, pace=Pace(max_parallel=2))
    fire(database, NOON)
    assert feed(database) == 2
    end(database, 1)
    assert feed(database) == 1
    end(database)
    assert feed(database) == 2
    assert sorted(moved(database).values()) == [1] * ADAPTERS


def test_jobs_start_inside_the_window_only(database: Database, base: str) -> None:
    window = {"from": "22:00", "to": "06:00", "timezone": "Europe/Berlin"}
    make(database, base, pace=Pace(max_parallel=3, window=window))
    fire(database, NOON)
    assert feed(database, NOON) == 0
    assert feed(database, datetime(2026, 5, 4, 19, 59, tzinfo=UTC)) == 0, "22:00 in Berlin is 20:00 UTC in May"
    assert feed(database, datetime(2026, 5, 4, 20, 0, tzinfo=UTC)) == 3
    end(database)
    assert feed(database, datetime(2026, 5, 5, 4, 0, tzinfo=UTC)) == 0
    assert feed(database, datetime(2026, 5, 5, 3, 59, tzinfo=UTC)) == 2


def test_what_waits_when_the_window_closes_waits_for_the_next_one(database: Database, base: str) -> None:
    window = {"from": "22:00", "to": "06:00", "timezone": "UTC"}
    schedule_id = make(database, base, pace=Pace(max_parallel=2, window=window))
    night, day = (datetime(2026, 5, 5, hour, 0, tzinfo=UTC) for hour in (23, 9))
    fire(database, NOON)
    assert feed(database, night) == 2
    with database.write() as session:
        other = jobs.create_job(session, "merge", {}).id
        claims.register_server(session, "srv_1", "boot", "here", [])

    def settle(moment: datetime) -> int:
        with database.read() as session:
            due = parking.is_due(session, moment)
        with database.write() as session:
            changed = parking.settle(session, moment)
        assert due == bool(changed)
        return changed

    def claim() -> str | None:
        with database.write() as session:
            found = claims.claim_next(session, server_id="srv_1", boot_id="boot", slot="cpu:0", lease_seconds=60)
        return None if found is None else found.job_id

    assert settle(night) == 0
    running = claim()
    assert running not in (None, other), "the window is open, and it is the oldest"
    assert settle(day) == 1
    assert settle(day) == 0
    assert [claim(), claim()] == [other, None]
    with database.read() as session:
        parked = session.scalars(select(JobRow).where(JobRow.state == "queued")).one()
        waiting = outlook.outlook_of(session, parked, 60).waiting
    assert waiting is not None
    assert (waiting.reason, schedule_id in waiting.detail) == ("window", True)
    assert settle(night) == 1
    assert claim() == parked.id
    assert settle(day) == 0, "what has started is not held back"


def test_windows() -> None:
    day = Window.parse("08:00", "18:30", "UTC")
    clocks = ("07:59", "08:00", "18:29", "18:30")
    shown = [datetime.fromisoformat(f"2026-05-04T{clock}:00+00:00") for clock in clocks]
    assert [day.is_open(moment) for moment in shown] == [False, True, True, False]
    assert Window.of(day.document()) == day
    for start, end_, zone, pointer in (
        ("8:00", "18:00", "UTC", "/window/from"),
        ("08:00", "24:00", "UTC", "/window/to"),
        ("08:00", "08:00", "UTC", "/window/to"),
        ("08:00", "09:00", "Mars/Base", "/window/timezone"),
    ):
        with pytest.raises(RequestInvalid) as refused:
            Window.parse(start, end_, zone)
        assert [item.pointer for item in refused.value.errors] == [pointer]


def test_a_firing_is_skipped_while_an_earlier_fleet_is_at_work(database: Database, base: str) -> None:
    schedule_id = make(database, base, pace=Pace(max_parallel=1))
    fire(database, NOON)
    (skipped,) = fire(database, NOON + timedelta(days=1))
    assert (skipped.outcome, skipped.detail) == ("skipped", "adapters of an earlier firing still wait for their jobs")
    with pytest.raises(StateConflict), database.write() as session:
        firings.trigger_now(session, schedule_id, no_job)
    for _ in range(ADAPTERS):
        assert feed(database) == 1
        (skipped,) = fire(database, NOON + timedelta(days=1 + len(moved(database))))
        assert skipped.outcome == "skipped"
        end(database)
    assert len(items(database)) == ADAPTERS
    (fleet,) = fire(database, NOON + timedelta(days=30))[-1:]
    assert (fleet.outcome, len(items(database))) == ("fleet", 2 * ADAPTERS)


def test_what_the_selector_leaves_out(database: Database, base: str) -> None:
    for selector, number in (
        ({"tags": ["live"]}, ADAPTERS - 1),
        ({"tags": ["live", "none"]}, 0),
        ({"name": "oRDERS 3"}, 1),
        ({"owner": new_id("key")}, 0),
        ({"transferable": True}, 0),
        ({"transferable": False}, ADAPTERS),
    ):
        schedule_id = make(database, base, Trigger(cron="0 0 1 1 *"), selector=selector)
        with database.write() as session:
            firing = firings.trigger_now(session, schedule_id, no_job)
            assert (firing.outcome, fleets.figures(session, firing).total) == ("fleet", number), selector
            assert fleets.figures(session, firing).finished == (number == 0)


def test_a_full_queue_is_tried_again_and_a_refusal_is_told(database: Database, base: str) -> None:
    make(database, base)
    fire(database, NOON)

    def full(session: Session, row: ScheduleRow, adapter_id: str) -> MadeJob:
        raise QueueFull("full")

    with pytest.raises(QueueFull):
        feed(database, submit=full)
    assert {item.state for item in items(database)} == {"pending"}
    others: list[str] = []

    def picky(session: Session, row: ScheduleRow, adapter_id: str) -> MadeJob:
        others.append(adapter_id)
        if len(others) == 1:
            raise RequestInvalid("it has no discriminator")
        made = submit(session, row, adapter_id)
        return MadeJob(made.job, len(others) > 2)

    assert feed(database, submit=picky) == ADAPTERS
    found = {item.adapter_id: item for item in items(database)}
    assert found[others[0]].state == "refused"
    assert found[others[0]].detail == "invalid_request: it has no discriminator"
    assert [found[other].state for other in others[1:]] == ["already", "job", "job", "job"]
    with database.read() as session:
        (firing,) = session.scalars(select(FiringRow))
        states = fleets.figures(session, firing).states
    assert states == {"refused": 1, "already": 1, "queued": 3}


def test_a_pause_holds_the_fleet_and_a_delete_ends_it(database: Database, base: str) -> None:
    schedule_id = make(database, base, pace=Pace(max_parallel=1))
    fire(database, NOON)
    with database.write() as session:
        schedules.update_schedule(session, schedule_id, enabled=False)
    assert feed(database) == 0
    with database.write() as session:
        with pytest.raises(StateConflict):
            firings.trigger_now(session, schedule_id, no_job)
        schedules.update_schedule(session, schedule_id, enabled=True)
    assert feed(database) == 1
    with database.write() as session:
        schedules.delete_schedule(session, schedule_id)
    assert feed(database) == 1
    assert Counter(item.state for item in items(database)) == {"job": 1, "refused": ADAPTERS - 1}
    assert {item.detail for item in items(database)} == {None, "the schedule was deleted"}


def test_a_deprecation_starts_the_fleet_once(database: Database, base: str) -> None:
    make(database, base, Trigger(event="base_model.deprecated", subject=base))
    with database.read() as session:
        ahead = session.scalars(select(ScheduleRow.created_at)).one() + timedelta(hours=1)
    with database.write() as session:
        retirement.deprecate(session, base, Retirement(deprecate_at=datetime(2020, 1, 1, tzinfo=UTC)))
    gate = threading.Barrier(2)

    def serve() -> None:
        gate.wait(60)
        while True:
            with database.write() as session:
                if firings.fire_event(session, no_job, moment=ahead) is None:
                    break
        feed(database)

    servers = [threading.Thread(target=serve) for _ in range(2)]
    for server in servers:
        server.start()
    for server in servers:
        server.join(60)
    serve_again = feed(database)
    assert serve_again in (0, ADAPTERS)
    assert sorted(moved(database).values()) == [1] * ADAPTERS


def test_what_only_a_fleet_has_is_refused_elsewhere(database: Database, base: str) -> None:
    with pytest.raises(RequestInvalid, match="/overlap"):
        make(database, base, overlap="queue")
    window = {"from": "22:00", "to": "06:00"}
    with database.write() as session:
        for pace in (Pace(max_parallel=2), Pace(window=window)):
            with pytest.raises(RequestInvalid):
                schedules.create_schedule(session, DAILY, JobTemplate("merge", {}, {}), pace=pace)
    schedule_id = make(database, base, Trigger(cron="0 3 * * *", timezone="Asia/Tokyo"), pace=Pace(window=window))
    with database.write() as session:
        row = schedules.get_schedule(session, schedule_id)
        assert (row.max_parallel, row.window) == (8, {**window, "timezone": "Asia/Tokyo"})
        row = schedules.update_schedule(session, schedule_id, max_parallel=3)
        assert (row.version, row.max_parallel, row.window) == (2, 3, {**window, "timezone": "Asia/Tokyo"})
        row = schedules.update_schedule(session, schedule_id, job=JobTemplate("merge", {}, {}))
        assert (row.max_parallel, row.window, row.job_selector) == (None, None, None)


def _feed_and_die(url: str, schedule_id: str, before_commit: bool) -> None:
    """Make one job, and be killed: in its transaction, or right behind it."""
    database = Database(url)

    def dying(session: Session, row: ScheduleRow, adapter_id: str) -> MadeJob:
        made = submit(session, row, adapter_id)
        session.flush()
        if before_commit:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    with database.write() as session:
        fleets.feed(session, schedule_id, dying, moment=NOON)
    os.kill(os.getpid(), signal.SIGKILL)


def test_kill_9_between_the_jobs_of_a_fleet(database: Database, base: str, processes: ForkServerContext) -> None:
    schedule_id = make(database, base)
    fire(database, NOON)
    url = database.url.render_as_string(hide_password=False)
    for before_commit, made in ((True, 0), (False, 1), (True, 1), (False, 2)):
        server = processes.Process(target=_feed_and_die, args=(url, schedule_id, before_commit), daemon=True)
        server.start()
        server.join(60)
        assert server.exitcode == -signal.SIGKILL
        assert sorted(moved(database).values()) == [1] * made
    assert feed(database) == ADAPTERS - 2
    assert sorted(moved(database).values()) == [1] * ADAPTERS
    assert {item.state for item in items(database)} == {"job"}
