"""Run times of a kind, and what they say of a job that runs."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import update

from storage import claims, jobs
from storage.database import Database
from storage.history import NEWEST, RunTimes, run_times, seconds_left
from storage.tables import JobAttemptRow

RESULT = {"adapters": [], "images": [], "report": {}}


def run_job(database: Database, seconds: float, kind: str = "merge", state: str = "succeeded") -> str:
    """A job that ran so long."""
    with database.write() as session:
        job_id = jobs.create_job(session, kind, {}).id
        claim = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=600)
        assert claim is not None
        assert claim.job_id == job_id
        if state == "succeeded":
            claims.finish_succeeded(session, job_id, claim.attempt, RESULT)
        else:
            claims.finish_failed(session, job_id, claim.attempt, {"code": "x", "detail": "y"})
        attempt = session.get_one(JobAttemptRow, (job_id, claim.attempt))
        session.refresh(attempt)
        assert attempt.finished_at is not None
        session.execute(
            update(JobAttemptRow)
            .where(JobAttemptRow.job_id == job_id)
            .values(started_at=attempt.finished_at - timedelta(seconds=seconds))
        )
    return job_id


def test_too_few_runs_say_nothing(database: Database) -> None:
    for seconds in (1.0, 2.0):
        run_job(database, seconds)
    with database.read() as session:
        assert run_times(session, "merge") is None
        assert run_times(session, "train") is None


def test_only_succeeded_jobs_of_the_kind_count(database: Database) -> None:
    for seconds in (1.0, 2.0, 4.0):
        run_job(database, seconds)
    run_job(database, 1000.0, state="failed")
    run_job(database, 1000.0, kind="train")
    with database.read() as session:
        assert run_times(session, "merge") == RunTimes(3, 2.0, 4.0)


def test_only_the_newest_count(database: Database) -> None:
    for _ in range(3):
        run_job(database, 1000.0)
    for _ in range(NEWEST):
        run_job(database, 5.0)
    with database.read() as session:
        assert run_times(session, "merge") == RunTimes(NEWEST, 5.0, 5.0)


def test_only_the_attempt_that_succeeded_counts(database: Database) -> None:
    ids = [run_job(database, 3.0) for _ in range(3)]
    with database.write() as session:
        attempt = session.get_one(JobAttemptRow, (ids[0], 1))
        session.add(
            JobAttemptRow(
                job_id=ids[0],
                attempt=0,
                server_id="srv",
                slot="cpu:0",
                started_at=attempt.started_at - timedelta(hours=1),
                finished_at=attempt.started_at,
                outcome="lost",
            )
        )
    with database.read() as session:
        assert run_times(session, "merge") == RunTimes(3, 3.0, 3.0)


def test_quantiles() -> None:
    times = RunTimes.of([float(number) for number in range(100, 0, -1)])
    assert times == RunTimes(100, 50.5, 90.0)
    assert RunTimes.of([1.0, 2.0]) is None
    assert RunTimes.of([1.0, 1.0, 9.0]) == RunTimes(3, 1.0, 9.0)


HISTORY = RunTimes(10, 60.0, 100.0)


@pytest.mark.parametrize(
    ("fraction", "elapsed", "history", "expected"),
    [
        (0.0, 0.0, None, None),
        (0.0, 5.0, None, None),
        (0.5, 30.0, None, 30.0),
        (0.25, 10.0, None, 30.0),
        (1.0, 10.0, None, 0.0),
        (0.0, 10.0, HISTORY, 50.0),
        (0.0, 70.0, HISTORY, 30.0),  # slower than half of them: the slow ones count
        (0.0, 110.0, HISTORY, None),  # slower than nearly all: nobody knows
        (0.5, 30.0, HISTORY, 30.0),
        (0.5, 10.0, HISTORY, 0.5 * 10.0 + 0.5 * 50.0),
        (0.9, 9.0, HISTORY, pytest.approx(0.9 * 1.0 + 0.1 * 51.0)),
        (0.5, 200.0, HISTORY, 200.0),
    ],
)
def test_time_left(fraction: float, elapsed: float, history: RunTimes | None, expected: float | None) -> None:
    assert seconds_left(fraction, elapsed, history) == expected
