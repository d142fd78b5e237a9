from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from artifacts.errors import AttemptCancelled, AttemptStale, NotFound, StateConflict
from storage import claims, jobs
from storage.database import Database, now
from storage.tables import TERMINAL_STATES, JobAttemptRow, JobEventRow, JobRow

ERROR = {"code": "worker_crashed", "detail": "killed by signal 9"}
EXIT = {"code": None, "signal": 9, "peak_memory": 1000}


def start(database: Database, *, lease_seconds: float = 60, server: str = "srv", boot: str = "boot") -> claims.Claim:
    """A new job that runs in its first attempt."""
    with database.write() as session:
        jobs.create_job(session, "merge", {"n": 1}, resources={"gpus": 0})
    return claim(database, lease_seconds=lease_seconds, server=server, boot=boot)


def claim(database: Database, *, lease_seconds: float = 60, server: str = "srv", boot: str = "boot") -> claims.Claim:
    with database.write() as session:
        claimed = claims.claim_next(session, server_id=server, boot_id=boot, slot="cpu:0", lease_seconds=lease_seconds)
    assert claimed is not None
    return claimed


def job_of(database: Database, claimed: claims.Claim) -> JobRow:
    with database.read() as session:
        return jobs.get_job(session, claimed.job_id)


def cancel(database: Database, claimed: claims.Claim) -> None:
    with database.write() as session:
        jobs.request_cancel(session, claimed.job_id)


def snapshot(database: Database) -> list[Any]:
    """Every column of every job, attempt and event."""
    with database.read() as session:
        rows = [
            row
            for table in (JobRow, JobAttemptRow, JobEventRow)
            for row in session.scalars(select(table).order_by(*table.__mapper__.primary_key))
        ]
        return [[getattr(row, column.key) for column in row.__mapper__.column_attrs] for row in rows]


def test_a_claim_gives_what_the_worker_needs(database: Database) -> None:
    claimed = start(database)
    assert (claimed.attempt, claimed.kind, claimed.params, claimed.resources) == (1, "merge", {"n": 1}, {"gpus": 0})
    job = job_of(database, claimed)
    assert (job.state, job.attempt, job.server_id, job.boot_id, job.slot) == ("running", 1, "srv", "boot", "cpu:0")
    assert job.started_at is not None
    assert job.lease_expires_at is not None
    assert job.lease_expires_at - job.started_at == timedelta(seconds=60)
    with database.read() as session:
        attempts = jobs.attempts_of(session, claimed.job_id)
        events = jobs.events_after(session, claimed.job_id, 1)
    assert [(attempt.attempt, attempt.slot, attempt.outcome) for attempt in attempts] == [(1, "cpu:0", None)]
    assert [event.data for event in events] == [{"state": "running", "attempt": 1, "server": "srv", "slot": "cpu:0"}]


def test_nothing_to_claim_is_none(database: Database) -> None:
    with database.write() as session:
        assert claims.claim_next(session, server_id="s", boot_id="b", slot="c", lease_seconds=60) is None


def test_claims_go_by_priority_then_age(database: Database) -> None:
    with database.write() as session:
        made = [jobs.create_job(session, "merge", {}, priority=priority).id for priority in (0, 5, 0, 5, -1)]
    claimed = [claim(database).job_id for _ in made]
    assert claimed == [made[1], made[3], made[0], made[2], made[4]]


def test_a_job_with_back_off_is_claimed_only_when_it_is_due(database: Database) -> None:
    claimed = start(database)
    with database.write() as session:
        arguments = {"error": ERROR, "exit": EXIT}
        assert claims.requeue(session, claimed.job_id, 1, delay_seconds=300, **arguments) == "queued"
    with database.write() as session:
        assert claims.claim_next(session, server_id="s", boot_id="b", slot="c", lease_seconds=60) is None
        jobs.get_job(session, claimed.job_id).available_at = now(session) - timedelta(seconds=1)
    assert claim(database).attempt == 2


def test_renewing_prolongs_and_tells_what_to_do(database: Database) -> None:
    kept, cancelled, lost = start(database), start(database), start(database)
    cancel(database, cancelled)
    with database.write() as session:
        claims.requeue(session, lost.job_id, 1, delay_seconds=0, error=ERROR, exit=None)
    attempts = [(claimed.job_id, claimed.attempt) for claimed in (kept, cancelled, lost)]
    before = snapshot(database)
    with database.write() as session:
        answers = claims.renew(session, [*attempts, ("job_none", 1), (kept.job_id, 7)], 500)
    assert [answers[attempt] for attempt in attempts] == ["ok", "cancel", "lost"]
    assert answers["job_none", 1] == answers[kept.job_id, 7] == "lost"
    job = job_of(database, kept)
    assert job.lease_expires_at is not None
    assert job.started_at is not None
    assert job.lease_expires_at >= job.started_at + timedelta(seconds=500)
    assert job_of(database, lost).lease_expires_at is None
    assert len(before) == len(snapshot(database))  # a renewal is no event


def test_progress_is_written_and_told(database: Database) -> None:
    claimed = start(database)
    with database.write() as session:
        claims.record_progress(session, claimed.job_id, 1, fraction=0.25, message="m" * 900, step=1, total=4)
    job = job_of(database, claimed)
    assert (job.fraction, job.step, job.total, job.message) == (0.25, 1, 4, "m" * 500)
    with database.write() as session:
        claims.record_progress(session, claimed.job_id, 1, fraction=7.0, message="over")
    job = job_of(database, claimed)
    assert (job.fraction, job.step, job.total) == (1.0, None, None)


def test_success_keeps_the_result(database: Database) -> None:
    claimed = start(database)
    with database.write() as session:
        claims.record_pid(session, claimed.job_id, 1, 4711)
        claims.finish_succeeded(session, claimed.job_id, 1, {"adapters": ["adp_1"], "report": {"energy": 0.5}})
    job = job_of(database, claimed)
    assert (job.state, job.fraction, job.error) == ("succeeded", 1.0, None)
    assert job.result == {"adapters": ["adp_1"], "report": {"energy": 0.5}}
    assert job.finished_at is not None
    assert job.lease_expires_at is None
    with database.write() as session:
        claims.record_log(session, claimed.job_id, 1, "ab" * 32)
    with database.read() as session:
        attempt = jobs.attempts_of(session, claimed.job_id)[0]
    assert (attempt.outcome, attempt.pid, attempt.log_sha256) == ("succeeded", 4711, "ab" * 32)
    assert attempt.finished_at is not None


def test_failure_keeps_error_and_exit(database: Database) -> None:
    claimed = start(database)
    with database.write() as session:
        assert claims.finish_failed(session, claimed.job_id, 1, {"code": "c", "detail": "d"}, EXIT) == "failed"
    job = job_of(database, claimed)
    assert job.state == "failed"
    assert job.error == {"code": "c", "detail": "d", "hint": None, "exit": EXIT}
    with database.read() as session:
        assert jobs.attempts_of(session, claimed.job_id)[0].exit == EXIT
        assert jobs.events_after(session, claimed.job_id, 2)[0].data["error"]["code"] == "c"


def writes_of(attempt: int) -> dict[str, Callable[[Session, str], object]]:
    """Everything that an attempt can write."""
    return {
        "fence": lambda session, job: claims.fence(session, job, attempt),
        "record_pid": lambda session, job: claims.record_pid(session, job, attempt, 1),
        "record_progress": lambda session, job: claims.record_progress(
            session, job, attempt, fraction=0.9, message="x"
        ),
        "finish_succeeded": lambda session, job: claims.finish_succeeded(
            session, job, attempt, {"adapters": ["stale"]}
        ),
        "finish_failed": lambda session, job: claims.finish_failed(session, job, attempt, ERROR, EXIT),
        "finish_cancelled": lambda session, job: claims.finish_cancelled(session, job, attempt, EXIT),
        "requeue": lambda session, job: claims.requeue(
            session, job, attempt, delay_seconds=0, error=ERROR, exit=EXIT, max_failures=0
        ),
    }


@pytest.mark.parametrize("write", list(writes_of(1)))
@pytest.mark.parametrize("situation", ["superseded", "queued again", "unknown", *TERMINAL_STATES])
def test_a_stale_attempt_writes_nothing(database: Database, write: str, situation: str) -> None:
    claimed = start(database)
    job_id = claimed.job_id
    if situation in ("superseded", "queued again"):
        with database.write() as session:
            claims.requeue(session, job_id, 1, delay_seconds=0, error=ERROR, exit=None)
        if situation == "superseded":
            assert claim(database).attempt == 2
    elif situation == "unknown":
        job_id = "job_none"
    else:
        if situation == "cancelled":
            cancel(database, claimed)
        finish = {"succeeded": "finish_succeeded", "failed": "finish_failed", "cancelled": "finish_cancelled"}
        with database.write() as session:
            writes_of(1)[finish[situation]](session, job_id)
    before = snapshot(database)
    with database.write() as session, pytest.raises(AttemptStale):
        writes_of(1)[write](session, job_id)
    assert snapshot(database) == before


@pytest.mark.parametrize("write", ["fence", "record_progress", "finish_succeeded"])
def test_an_attempt_of_a_job_being_cancelled_is_told_and_publishes_nothing(database: Database, write: str) -> None:
    claimed = start(database)
    cancel(database, claimed)
    before = snapshot(database)
    with database.write() as session, pytest.raises(AttemptCancelled):
        writes_of(1)[write](session, claimed.job_id)
    assert snapshot(database) == before


@pytest.mark.parametrize("write", ["finish_failed", "finish_cancelled", "requeue"])
def test_a_job_being_cancelled_ends_cancelled_whatever_its_attempt_says(database: Database, write: str) -> None:
    claimed = start(database)
    cancel(database, claimed)
    with database.write() as session:
        writes_of(1)[write](session, claimed.job_id)
    job = job_of(database, claimed)
    assert (job.state, job.error, job.result, job.failures) == ("cancelled", None, None, 0)
    with database.read() as session:
        attempt = jobs.attempts_of(session, claimed.job_id)[0]
    assert (attempt.outcome, attempt.exit) == ("cancelled", EXIT)


def test_a_job_that_nobody_cancelled_does_not_become_cancelled(database: Database) -> None:
    claimed = start(database)
    with database.write() as session, pytest.raises(StateConflict, match="nobody asked"):
        claims.finish_cancelled(session, claimed.job_id, 1)
    assert job_of(database, claimed).state == "running"


def test_three_infrastructure_failures_are_forgiven_and_the_fourth_is_final(database: Database) -> None:
    claimed = start(database)
    states = []
    for attempt in range(1, 5):
        with database.write() as session:
            arguments = {"error": ERROR, "exit": EXIT}
            states.append(claims.requeue(session, claimed.job_id, attempt, delay_seconds=0, **arguments))
        if states[-1] == "queued":
            assert claim(database).attempt == attempt + 1
    assert states == ["queued", "queued", "queued", "failed"]
    job = job_of(database, claimed)
    assert (job.state, job.failures, job.attempt) == ("failed", 4, 4)
    assert job.error == ERROR | {"hint": None, "exit": EXIT}
    with database.read() as session:
        assert [attempt.outcome for attempt in jobs.attempts_of(session, claimed.job_id)] == ["lost"] * 4


def test_a_second_attempt_starts_from_zero_progress_but_keeps_the_first_start(database: Database) -> None:
    claimed = start(database)
    started = job_of(database, claimed).started_at
    with database.write() as session:
        claims.record_progress(session, claimed.job_id, 1, fraction=0.7, message="far", step=7, total=10)
    with database.write() as session:
        claims.requeue(session, claimed.job_id, 1, delay_seconds=0, error=ERROR, exit=None)
    claim(database)
    job = job_of(database, claimed)
    assert (job.fraction, job.step, job.total, job.message, job.started_at) == (0.0, None, None, "", started)


def test_an_expired_lease_gives_the_job_back_and_counts_a_failure(database: Database) -> None:
    kept, expired = start(database, lease_seconds=60), start(database, lease_seconds=-1)
    with database.write() as session:
        assert claims.expire_leases(session) == 1
    assert job_of(database, kept).state == "running"
    job = job_of(database, expired)
    assert (job.state, job.failures) == ("queued", 1)
    with database.read() as session:
        assert jobs.attempts_of(session, job.id)[0].outcome == "lost"
        assert jobs.events_after(session, job.id, 2)[0].data["reason"]["code"] == "lease_expired"
    with database.write() as session:
        assert claims.renew(session, [(expired.job_id, 1)], 60) == {(expired.job_id, 1): "lost"}
        assert claims.expire_leases(session) == 0


def test_leases_that_expire_over_and_over_fail_the_job(database: Database) -> None:
    claimed = start(database, lease_seconds=-1)
    for _ in range(3):
        with database.write() as session:
            assert claims.expire_leases(session) == 1
        claim(database, lease_seconds=-1)
    with database.write() as session:
        assert claims.expire_leases(session) == 1
    job = job_of(database, claimed)
    assert job.state == "failed"
    assert job.error is not None
    assert job.error["code"] == "lease_expired"


def test_an_expired_lease_of_a_job_being_cancelled_cancels_it(database: Database) -> None:
    claimed = start(database, lease_seconds=-1)
    cancel(database, claimed)
    with database.write() as session:
        claims.expire_leases(session)
    assert job_of(database, claimed).state == "cancelled"


def test_a_restarted_server_releases_what_its_previous_boot_ran(database: Database) -> None:
    old, cancelled = start(database, boot="old"), start(database, boot="old")
    other = start(database, server="other", boot="old")
    current = start(database, boot="new")
    cancel(database, cancelled)
    with database.write() as session:
        assert claims.release_previous_boots(session, "srv", "new") == 2
    assert [job_of(database, claimed).state for claimed in (old, cancelled, other, current)] == [
        "queued",
        "cancelled",
        "running",
        "running",
    ]
    assert job_of(database, old).failures == 0
    assert claim(database, boot="new").attempt == 2
    with database.write() as session:
        assert claims.release_previous_boots(session, "srv", "new") == 0


def test_a_finished_job_is_not_released_or_expired(database: Database) -> None:
    claimed = start(database, lease_seconds=-1, boot="old")
    with database.write() as session:
        claims.finish_succeeded(session, claimed.job_id, 1, {})
    before = snapshot(database)
    with database.write() as session:
        assert claims.release_previous_boots(session, "srv", "new") == 0
        assert claims.expire_leases(session) == 0
    assert snapshot(database) == before


def test_every_change_is_an_event_without_gaps(database: Database) -> None:
    claimed = start(database)
    with database.write() as session:
        claims.record_progress(session, claimed.job_id, 1, fraction=0.5, message="half")
    with database.write() as session:
        claims.requeue(session, claimed.job_id, 1, delay_seconds=0, error=ERROR, exit=EXIT)
    claim(database)
    with database.write() as session:
        claims.finish_succeeded(session, claimed.job_id, 2, {})
    with database.read() as session:
        events = jobs.events_after(session, claimed.job_id, 0)
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6]
    told = [event.data.get("state", event.type) for event in events]
    assert told == ["queued", "running", "progress", "queued", "running", "succeeded"]
    assert job_of(database, claimed).last_event == 6


def test_servers_register_beat_and_go_silent(database: Database) -> None:
    slots = [{"name": "cpu:0", "device": "cpu"}]
    with database.write() as session:
        claims.register_server(session, "srv", "boot-1", "host", slots)
        claims.register_server(session, "other", "boot-9", "host", [])
    with database.write() as session:
        claims.register_server(session, "srv", "boot-2", "host", slots)
        claims.beat_server(session, "srv", [slots[0] | {"job_id": "job_1"}])
        with pytest.raises(NotFound):
            claims.beat_server(session, "nobody", slots)
    with database.read() as session:
        alive = claims.list_servers(session, 60)
        assert claims.list_servers(session, timedelta(seconds=-60)) == []
    assert [(row.id, row.boot_id) for row in alive] == [("other", "boot-9"), ("srv", "boot-2")]
    assert alive[1].slots == [{"name": "cpu:0", "device": "cpu", "job_id": "job_1"}]
