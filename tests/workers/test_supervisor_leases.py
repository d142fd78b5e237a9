"""Leases: restart recovery, servers that died, leases that were lost, and a database that goes away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import update
from structlog.testing import capture_logs

from storage import claims
from storage.database import now
from storage.tables import JobRow


@contextmanager
def database_away(pool: Any) -> Iterator[None]:
    """Move the database's files to where nobody finds them."""
    files = [path for path in pool.folder.iterdir() if path.name.startswith("rankwise.db")]
    hidden = pool.folder / "hidden"
    hidden.mkdir()
    for path in files:
        path.rename(hidden / path.name)
    try:
        yield
    finally:
        for path in files:
            (hidden / path.name).rename(path)


def claimed_by(pool: Any, job_id: str, server_id: str, boot_id: str, lease_seconds: float = 3600.0) -> None:
    with pool.database.write() as session:
        claim = claims.claim_next(
            session, server_id=server_id, boot_id=boot_id, slot="cpu:0", lease_seconds=lease_seconds
        )
        assert claim is not None
        assert claim.job_id == job_id


def test_a_restarted_server_takes_its_jobs_back_at_once(pool: Any) -> None:
    job_id = pool.submit("succeed")
    claimed_by(pool, job_id, "srv_test", "boot_before")
    pool.start()
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 2, 0)


def test_a_job_that_was_being_cancelled_when_the_server_died_is_cancelled(pool: Any) -> None:
    job_id = pool.submit("succeed")
    claimed_by(pool, job_id, "srv_test", "boot_before")
    pool.cancel(job_id)
    pool.start()
    assert pool.ended(job_id).state == "cancelled"


def test_another_servers_jobs_are_left_alone_while_its_lease_holds(pool: Any) -> None:
    theirs, ours = pool.submit("succeed"), pool.submit("succeed")
    claimed_by(pool, theirs, "srv_other", "boot_other")
    pool.start()
    pool.wait_for(ours, "succeeded")
    assert (pool.job(theirs).state, pool.job(theirs).attempt) == ("running", 1)


def test_jobs_of_a_dead_server_are_taken_over_when_their_lease_ends(pool: Any) -> None:
    job_id = pool.submit("succeed")
    claimed_by(pool, job_id, "srv_dead", "boot_dead", lease_seconds=0.01)
    pool.start()
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 2, 1)
    (event,) = [event for event in pool.events(job_id) if event.get("reason")]
    assert event["reason"]["code"] == "lease_expired"


def test_the_lease_is_renewed_while_the_job_runs(pool: Any, wait_until: Any) -> None:
    gate = pool.gate()
    job_id = pool.submit("wait_for_gate", gate=str(gate.path))
    pool.start(lease_seconds=5.0, beat_seconds=0.1)
    pool.running_pid(job_id)
    first = pool.job(job_id).lease_expires_at
    wait_until(lambda: pool.job(job_id).lease_expires_at > first + timedelta(seconds=0.5), "the lease moves on")
    gate.open()
    assert pool.ended(job_id).attempt == 1


def test_an_attempt_that_lost_its_lease_is_killed_and_writes_nothing(pool: Any, wait_until: Any, exists: Any) -> None:
    job_id = pool.submit("wait_for_gate", gate=str(pool.gate().path))
    supervisor = pool.start()
    pid = pool.running_pid(job_id)
    with pool.database.write() as session:
        session.execute(
            update(JobRow)
            .where(JobRow.id == job_id)
            .values(
                attempt=2,
                server_id="srv_other",
                boot_id="boot_other",
                lease_expires_at=now(session) + timedelta(hours=1),
            )
        )
    wait_until(lambda: not exists(pid), "the worker is dead")
    wait_until(lambda: supervisor.status()[0]["state"] == "idle", "the slot is free")
    job = pool.job(job_id)
    assert (job.state, job.attempt, job.server_id, job.failures) == ("running", 2, "srv_other", 0)


def test_a_short_outage_of_the_database_costs_nothing(pool: Any, wait_until: Any) -> None:
    gate = pool.gate()
    job_id = pool.submit("wait_for_gate", gate=str(gate.path))
    pool.start()
    pid = pool.running_pid(job_id)
    with capture_logs() as logs, database_away(pool):
        wait_until(lambda: [entry for entry in logs if entry["event"] == "database_outage"], "the outage is seen")
    gate.open()
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 1, 0)
    assert job.result["report"]["pid"] == pid


def test_a_worker_whose_lease_can_not_be_renewed_is_killed_and_the_job_runs_again(
    pool: Any, wait_until: Any, exists: Any
) -> None:
    job_id = pool.submit("wait_once", gate=str(pool.gate().path))
    pool.start(lease_seconds=1.0)
    pid = pool.running_pid(job_id)
    with database_away(pool):
        wait_until(lambda: not exists(pid), "the worker is dead while the database is away")
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 2, 1)


def test_a_failure_during_an_outage_is_written_afterwards(pool: Any, wait_until: Any) -> None:
    gate = pool.gate()
    job_id = pool.submit("deaf_then_succeed", gate=str(gate.path))
    pool.start()
    pool.running_pid(job_id)
    with capture_logs() as logs, database_away(pool):
        wait_until(lambda: [entry for entry in logs if entry["event"] == "database_outage"], "the outage is seen")
        gate.open()  # the attempt can not publish
        wait_until(lambda: (pool.folder / "work").is_dir() and not scratches(pool.folder), "the attempt has ended")
    gate.open()
    job = pool.ended(job_id)
    assert (job.state, job.attempt, job.failures) == ("succeeded", 2, 1)
    (event,) = [event for event in pool.events(job_id) if event.get("reason")]
    assert event["reason"]["code"] == "database_unavailable"


def scratches(folder: Path) -> list[Path]:
    return [path for path in (folder / "work" / "srv_test").iterdir() if path.name != "logs"]


def test_a_server_that_starts_before_its_database_waits_for_it(pool: Any, wait_until: Any) -> None:
    job_id = pool.submit("succeed")
    with capture_logs() as logs, database_away(pool):
        pool.start()
        wait_until(lambda: [entry for entry in logs if entry["event"] == "database_outage"], "the outage is seen")
    assert pool.ended(job_id).state == "succeeded"
