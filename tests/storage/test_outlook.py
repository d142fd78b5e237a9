"""Place in the queue, reason for waiting, and time until the end."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Select, event, insert, text, update
from sqlalchemy.orm import Session

from storage import claims, jobs, keys, outlook, servers
from storage import database as clock
from storage.claims import SlotOffer
from storage.database import Database
from storage.ids import new_id
from storage.outlook import Outlook, ahead_statement, outlook_of, position_of
from storage.tables import ApiKeyRow, JobAttemptRow, JobQueueRow, JobRow

ALIVE = 60.0
RESULT: dict[str, Any] = {"adapters": [], "images": [], "report": {}}


def slot(name: str, state: str = "idle", host: str = "here") -> dict[str, Any]:
    return {"name": name, "device": "cpu", "host": host, "state": state, "warm": []}


def serve(session: Session, *slots: dict[str, Any], server_id: str = "srv") -> None:
    servers.register_server(session, server_id, "boot", "here", slots or [slot("cpu:0")])


def claim(session: Session, *names: str) -> str:
    found = claims.claim_many(
        session,
        server_id="srv",
        boot_id="boot",
        slots=[SlotOffer(name) for name in names or ("cpu:0",)],
        lease_seconds=600,
    )
    (one,) = found.claims
    return one.job_id


def run_history(session: Session, kind: str, seconds: float, runs: int = 3) -> None:
    """Jobs of this kind that have run so long."""
    moment = clock.now(session) - timedelta(days=1)
    for _ in range(runs):
        job_id = new_id("job")
        session.add(
            JobRow(
                id=job_id,
                kind=kind,
                params={},
                resources={},
                state="succeeded",
                attempt=1,
                available_at=moment,
                created_at=moment,
                result=RESULT,
            )
        )
        session.flush()
        session.add(
            JobAttemptRow(
                job_id=job_id,
                attempt=1,
                server_id="srv",
                slot="cpu:0",
                started_at=moment,
                finished_at=moment + timedelta(seconds=seconds),
                outcome="succeeded",
            )
        )
    session.flush()


def limited_key(session: Session, name: str, max_running: int | None = None) -> str:
    row, _ = keys.create_key(session, name, ["jobs"])
    session.execute(update(ApiKeyRow).where(ApiKeyRow.id == row.id).values(max_running=max_running))
    return row.id


def reason(session: Session, job: JobRow) -> str:
    waiting = outlook_of(session, job, ALIVE).waiting
    assert waiting is not None
    assert waiting.detail.endswith(".")
    return waiting.reason


def test_with_one_owner_the_place_is_exact(database: Database) -> None:
    with database.write() as session:
        first = jobs.create_job(session, "merge", {})
        wide = jobs.create_job(session, "merge", {}, resources={"devices": 2})
        last = jobs.create_job(session, "merge", {})
        urgent = jobs.create_job(session, "merge", {}, priority=5)
        assert [position_of(session, job) for job in (urgent, first, wide, last)] == [1, 2, 3, 4]
        assert [outlook_of(session, job, ALIVE).position for job in (urgent, last)] == [1, 4]
        jobs.request_cancel(session, first.id)
        assert position_of(session, first) is None
        assert position_of(session, last) == 3


def test_owners_take_turns(database: Database) -> None:
    with database.write() as session:
        many, few = limited_key(session, "many"), limited_key(session, "few")
        crowd = [jobs.create_job(session, "merge", {}, created_by=many) for _ in range(10)]
        late = [jobs.create_job(session, "merge", {}, created_by=few) for _ in range(2)]
        assert [position_of(session, job) for job in late] == [2, 4]
        assert position_of(session, crowd[0]) == 2
        assert position_of(session, crowd[9]) == 12


def test_a_place_far_behind_is_not_counted(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlook, "LOOK_AHEAD", 20)
    with database.write() as session:
        moment = clock.now(session)
        session.execute(
            insert(JobRow),
            [
                {
                    "id": f"job_{number:032x}",
                    "kind": "merge",
                    "params": {},
                    "resources": {},
                    "state": "queued",
                    "available_at": moment,
                    "created_at": moment,
                }
                for number in range(22)
            ],
        )
        session.add(JobQueueRow(owner="anonymous", devices=1, queued=22, running=0))
        session.flush()
        reached = jobs.get_job(session, f"job_{20:032x}")
        beyond = jobs.get_job(session, f"job_{21:032x}")
        assert position_of(session, reached) == 21
        serve(session, slot("cpu:0", "idle"))
        found = outlook_of(session, beyond, ALIVE)
    assert (found.position, found.eta_seconds) == (None, None)
    assert found.waiting is not None
    assert "more than 20." in found.waiting.detail


def test_the_place_is_a_range_of_the_queue_index(database: Database) -> None:
    with database.write() as session:
        session.execute(
            insert(JobRow),
            [
                {
                    "id": f"job_{number:032x}",
                    "kind": "merge",
                    "params": {},
                    "resources": {},
                    "state": "queued",
                    "available_at": clock.now(session),
                    "created_at": clock.now(session),
                }
                for number in range(2000)
            ],
        )
        session.execute(text("ANALYZE"))
        job = jobs.get_job(session, f"job_{1000:032x}")
        plan = explain(session, ahead_statement(job, 1, 10))
    assert "ix_jobs_queue" in plan, plan
    expected = "(precedence,created_at,id)<" if database.is_sqlite else "ROW(precedence, created_at, "
    assert expected in plan, plan


def explain(session: Session, statement: Select[Any]) -> str:
    """The plan of a statement, with its parameters as they are sent to the database."""
    sent: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, sql: str, parameters: Any, *_: Any) -> None:
        sent.append((sql, parameters))

    connection = session.connection()
    event.listen(connection, "before_cursor_execute", note)
    session.execute(statement)
    event.remove(connection, "before_cursor_execute", note)
    sql, parameters = sent[-1]
    prefix = "EXPLAIN QUERY PLAN " if connection.dialect.name == "sqlite" else "EXPLAIN "
    return "\n".join(str(row) for row in connection.exec_driver_sql(prefix + sql, parameters))


def test_reasons(database: Database) -> None:
    with database.write() as session:
        job = jobs.create_job(session, "merge", {})
        assert reason(session, job) == "no_server"
        serve(session, slot("cpu:0", "starting"))
        assert reason(session, job) == "starting"
        serve(session, slot("cpu:0", "idle"))
        assert reason(session, job) == "next"
        other = claim(session)
        assert other == job.id
        behind = jobs.create_job(session, "merge", {})
        waiting = outlook_of(session, behind, ALIVE).waiting
        assert waiting is not None
        assert (waiting.reason, waiting.detail) == ("slots_busy", "All 1 slots are busy; jobs ahead: 0.")


def test_a_job_that_backs_off(database: Database) -> None:
    with database.write() as session:
        serve(session)
        job = jobs.create_job(session, "merge", {})
        claim(session)
        error = {"code": "worker_crashed", "detail": "it did"}
        claims.requeue(session, job.id, 1, delay_seconds=300, error=error, exit=None)
        session.refresh(job)
        found = outlook_of(session, job, ALIVE)
    assert found.waiting is not None
    assert found.waiting.reason == "back_off"
    assert job.available_at.strftime("%H:%M:%SZ") in found.waiting.detail
    assert found.eta_seconds is None


def test_a_silent_server_does_not_count(database: Database) -> None:
    with database.write() as session:
        serve(session)
        job = jobs.create_job(session, "merge", {})
        assert reason(session, job) == "next"
        row = servers.list_servers(session, ALIVE)[0]
        row.seen_at -= timedelta(seconds=ALIVE + 1)
        session.flush()
        assert reason(session, job) == "no_server"


def test_a_key_at_its_limit(database: Database) -> None:
    with database.write() as session:
        serve(session, slot("cpu:0"), slot("cpu:1"))
        owner = limited_key(session, "small", max_running=1)
        jobs.create_job(session, "merge", {}, created_by=owner)
        claim(session)
        waits = jobs.create_job(session, "merge", {}, created_by=owner)
        assert reason(session, waits) == "quota"
        free = jobs.create_job(session, "merge", {})
        assert reason(session, free) == "next"


def test_several_devices(database: Database) -> None:
    with database.write() as session:
        serve(session, slot("a:0", host="a"), slot("a:1", host="a"), slot("b:0", host="b"))
        three = jobs.create_job(session, "merge", {}, resources={"devices": 3})
        waiting = outlook_of(session, three, ALIVE).waiting
        assert waiting is not None
        assert (waiting.reason, waiting.detail) == (
            "devices",
            "It needs 3 devices of one host; the largest host has 2.",
        )
        serve(session, slot("a:0", host="a"), slot("a:1", "running", host="a"), slot("b:0", host="b"))
        two = jobs.create_job(session, "merge", {}, resources={"devices": 2})
        waiting = outlook_of(session, two, ALIVE).waiting
        assert waiting is not None
        assert waiting.reason == "devices"
        assert waiting.detail.endswith("idle on one are 1.")
        two.held_by, two.held_until = "srv", clock.now(session) + timedelta(seconds=60)
        session.flush()
        assert reason(session, two) == "held"
        two.held_until = clock.now(session) - timedelta(seconds=1)
        session.flush()
        assert reason(session, two) == "devices"


def test_a_running_job_will_end(database: Database) -> None:
    with database.write() as session:
        serve(session)
        job = jobs.create_job(session, "merge", {})
        claim(session)
        session.refresh(job)
        assert outlook_of(session, job, ALIVE) == Outlook()
        run_history(session, "merge", 100.0)
        attempt = session.get_one(JobAttemptRow, (job.id, 1))
        attempt.started_at = clock.now(session) - timedelta(seconds=20)
        claims.record_progress(session, job.id, 1, fraction=0.5, message="half way")
        eta = outlook_of(session, job, ALIVE).eta_seconds
        assert eta == pytest.approx(0.5 * 20 + 0.5 * 80, abs=2)
        jobs.request_cancel(session, job.id)
        assert outlook_of(session, job, ALIVE) == Outlook()


def test_a_queued_job_will_end(database: Database) -> None:
    with database.write() as session:
        serve(session, slot("cpu:0"), slot("cpu:1"))
        run_history(session, "merge", 10.0)
        queued = [jobs.create_job(session, "merge", {}) for _ in range(6)]
        assert outlook_of(session, queued[0], ALIVE).eta_seconds == 10.0
        assert outlook_of(session, queued[1], ALIVE).eta_seconds == 10.0
        claims.claim_many(
            session,
            server_id="srv",
            boot_id="boot",
            slots=[SlotOffer("cpu:0"), SlotOffer("cpu:1")],
            lease_seconds=600,
        )
        # Two run, so the first that waits needs one of them to end, which takes half of 10 s / 2.
        assert outlook_of(session, queued[2], ALIVE).eta_seconds == 12.5
        assert outlook_of(session, queued[5], ALIVE).eta_seconds == 27.5


def test_no_time_is_told_that_nobody_can_know(database: Database) -> None:
    with database.write() as session:
        run_history(session, "merge", 10.0)
        job = jobs.create_job(session, "merge", {})
        assert outlook_of(session, job, ALIVE).eta_seconds is None  # no server
        serve(session)
        assert outlook_of(session, job, ALIVE).eta_seconds == 10.0
        wide = jobs.create_job(session, "merge", {}, resources={"devices": 2})
        assert outlook_of(session, wide, ALIVE).eta_seconds is None
        jobs.create_job(session, "train", {})  # of which nothing is known, and it may go first
        assert outlook_of(session, job, ALIVE).eta_seconds is None


def test_other_kinds_that_wait_count_with_their_own_times(database: Database) -> None:
    with database.write() as session:
        serve(session)
        run_history(session, "merge", 10.0)
        run_history(session, "train", 100.0)
        jobs.create_job(session, "train", {})
        job = jobs.create_job(session, "merge", {})
        # One of them is ahead and takes (100 + 10) / 2 on average.
        assert outlook_of(session, job, ALIVE).eta_seconds == pytest.approx(0.5 * 55.0 + 10.0)
