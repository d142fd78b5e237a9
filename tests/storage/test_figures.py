"""The numbers that are watched."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import event, update
from sqlalchemy.orm import Session

from storage import claims, job_logs, jobs, keys, servers
from storage import database as clock
from storage.automation_tables import ScheduleRow, WebhookDeliveryRow, WebhookRow
from storage.database import Database
from storage.figures import Figures, StoredFigures, figures, stored_figures
from storage.job_logs import Piece
from storage.tables import BlobRow, JobRow

LEASE = 60.0


def look(session: Session) -> Figures:
    return figures(session, servers.list_servers(session, LEASE), LEASE)


def slot(name: str, state: str, busy_seconds: float) -> dict[str, Any]:
    device = name.partition(":")[0]
    return {"name": name, "device": device, "host": "here", "state": state, "busy_seconds": busy_seconds}


def test_an_empty_service(database: Database) -> None:
    with database.read() as session:
        assert look(session) == Figures()
        empty = dict.fromkeys(("pending", "delivered", "failed"), 0)
        assert stored_figures(session) == StoredFigures(0, 0, 0, empty)


def test_jobs_and_their_ages(database: Database) -> None:
    with database.write() as session:
        key, _ = keys.create_key(session, "other", ["jobs"])
        oldest = jobs.create_job(session, "merge", {})
        jobs.create_job(session, "merge", {}, created_by=key.id)
        second = jobs.create_job(session, "merge", {})
        oldest.created_at -= timedelta(seconds=90)
        session.flush()
        found = look(session)
        assert (found.queued, found.running, found.owners_waiting, found.lease_age) == (3, 0, 2, 0.0)
        assert found.queue_age == pytest.approx(90, abs=10)
        for _ in range(3):
            claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=LEASE)
        jobs.request_cancel(session, second.id)
        found = look(session)
        assert (found.queued, found.running, found.owners_waiting, found.queue_age) == (0, 3, 0, 0.0)
        assert found.lease_age < 10
        session.execute(
            update(JobRow)
            .where(JobRow.id == second.id)
            .values(lease_expires_at=clock.now(session) + timedelta(seconds=LEASE - 40))
        )
        assert look(session).lease_age == pytest.approx(40, abs=10)


def test_slots_of_the_servers_that_are_alive(database: Database) -> None:
    with database.write() as session:
        first = [slot("cpu:0", "idle", 1.5), slot("cpu:1", "running", 2.0), slot("cuda:0", "running", 7.0)]
        servers.register_server(session, "srv_1", "boot", "a", first)
        servers.register_server(session, "srv_2", "boot", "b", [slot("cpu:0", "idle", 3.0)])
        gone = servers.register_server(session, "srv_3", "boot", "c", [slot("cpu:0", "idle", 9.0)])
        gone.seen_at -= timedelta(seconds=LEASE + 10)
        session.flush()
        found = look(session)
    assert found.servers == 2
    assert dict(found.slots) == {("cpu", "idle"): 2, ("cpu", "running"): 1, ("cuda", "running"): 1}
    assert dict(found.busy_seconds) == {("srv_1", "cpu"): 3.5, ("srv_1", "cuda"): 7.0, ("srv_2", "cpu"): 3.0}


def add_schedule(session: Session, due_in: float | None) -> None:
    moment = clock.now(session)
    session.add(
        ScheduleRow(
            id=f"sch_{due_in}",
            name="nightly",
            job_kind="merge",
            job_params={},
            job_resources={},
            overlap="skip",
            misfire="skip",
            next_fire_at=None if due_in is None else moment + timedelta(seconds=due_in),
            created_at=moment,
            updated_at=moment,
        )
    )
    session.flush()


def test_the_lag_of_schedules(database: Database) -> None:
    with database.write() as session:
        add_schedule(session, None)
        add_schedule(session, 100)
        assert look(session).schedule_lag == 0.0
        add_schedule(session, -70)
        assert look(session).schedule_lag == pytest.approx(70, abs=10)


def add_delivery(session: Session, number: int, state: str, due_in: float) -> None:
    moment = clock.now(session)
    if session.get(WebhookRow, "whk_1") is None:
        session.add(
            WebhookRow(id="whk_1", url="https://x", secret="s", events=["*"], owner="anonymous", created_at=moment)
        )
        session.flush()
    session.add(
        WebhookDeliveryRow(
            id=f"msg_{number}",
            webhook_id="whk_1",
            event="job.failed",
            payload={},
            state=state,
            available_at=moment + timedelta(seconds=due_in),
            created_at=moment,
        )
    )
    session.flush()


def test_webhook_deliveries(database: Database) -> None:
    with database.write() as session:
        add_delivery(session, 1, "delivered", -1000)
        add_delivery(session, 2, "pending", 50)
        assert look(session).delivery_lag == 0.0
        add_delivery(session, 3, "pending", -80)
        assert look(session).delivery_lag == pytest.approx(80, abs=10)
        assert dict(stored_figures(session).deliveries) == {"pending": 2, "delivered": 1, "failed": 0}


def test_what_is_stored(database: Database) -> None:
    with database.write() as session:
        for number in range(3):
            session.add(BlobRow(sha256=f"{number:064x}", size=10**10, created_at=clock.now(session)))
        jobs.create_job(session, "merge", {})
        claim = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=LEASE)
        assert claim is not None
        job_logs.append_pieces(session, claim.job_id, claim.attempt, [Piece(0, "0123456789")])
        found = stored_figures(session)
    assert (found.blobs, found.blob_bytes, found.live_log_size) == (3, 3 * 10**10, 10)


@pytest.fixture
def statements(database: Database) -> Iterator[list[tuple[str, Any]]]:
    sent: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, sql: str, parameters: Any, *_: Any) -> None:
        sent.append((sql, parameters))

    event.listen(database.engine, "before_cursor_execute", note)
    yield sent
    event.remove(database.engine, "before_cursor_execute", note)


def test_the_cheap_ones_walk_through_no_large_table(database: Database, statements: list[tuple[str, Any]]) -> None:
    if not database.is_sqlite:
        pytest.skip("PostgreSQL reads an empty table whole, whatever its indexes")
    with database.read() as session:
        look(session)
        asked = [item for item in statements if item[0].startswith("SELECT") and "strftime" not in item[0]]
        plans = [
            str(row[3])
            for sql, parameters in asked
            for row in session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", parameters)
        ]
    walks = [plan for plan in plans if plan.startswith("SCAN") and "USING" not in plan]
    # The counters of the queue and the servers are few.
    assert {plan.split()[1] for plan in walks} <= {"job_queues", "servers"}, plans
    assert sum(plan.startswith("SEARCH jobs USING") and "ix_jobs" in plan for plan in plans) >= 2, plans
    assert any("ix_jobs_state" in plan for plan in plans), plans
    assert any("ix_schedules_due" in plan for plan in plans), plans
    assert any("ix_webhook_deliveries_pending" in plan for plan in plans), plans
