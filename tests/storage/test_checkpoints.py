"""Checkpoints and series of jobs: the newest counts, the sweep knows them, and nobody writes for a job that stops."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from artifacts.errors import AttemptCancelled, NotFound
from artifacts.manifest import FileEntry
from storage import checkpoints, claims, job_metrics, jobs
from storage.blob_rows import end_reservation, reserve_blobs
from storage.blobs import BlobStore
from storage.database import Database, now
from storage.job_metrics import Point
from storage.sweep import remove_unused, sweep_blobs
from storage.tables import BlobRow, JobRow

DAY = timedelta(hours=24)


@pytest.fixture
def job_id(database: Database) -> str:
    """A job in its first attempt."""
    with database.write() as session:
        made = jobs.create_job(session, "train", {}).id
        claims.register_server(session, "srv_1", "boot_1", "here", [])
        claim = claims.claim_next(session, server_id="srv_1", boot_id="boot_1", slot="cpu:0", lease_seconds=60)
        assert claim is not None
        assert claim.job_id == made
        return made


def keep(database: Database, blobs: BlobStore, job_id: str, content: str, step: int) -> tuple[str, str | None]:
    digest = blobs.put_bytes(content.encode())
    with database.write() as session:
        return digest, checkpoints.record_checkpoint(session, job_id, 1, step=step, sha256=digest, size=len(content))


def age_blobs(database: Database) -> None:
    with database.write() as session:
        session.execute(update(BlobRow).values(created_at=now(session) - 2 * DAY))


def test_the_newest_checkpoint_takes_the_place_of_the_one_before(
    database: Database, blobs: BlobStore, job_id: str
) -> None:
    first, replaced = keep(database, blobs, job_id, "one", 5)
    assert replaced is None
    second, replaced = keep(database, blobs, job_id, "two", 9)
    assert replaced == first
    assert keep(database, blobs, job_id, "two", 9) == (second, None)
    with database.read() as session:
        row = checkpoints.newest_checkpoint(session, job_id)
        assert row is not None
        assert (row.sha256, row.step, row.attempt) == (second, 9, 1)
    age_blobs(database)
    assert remove_unused(database, blobs, first)
    assert not blobs.exists(first)
    assert not remove_unused(database, blobs, second)
    assert blobs.exists(second)


def test_failures_are_counted_from_the_last_checkpoint_that_got_further(
    database: Database, blobs: BlobStore, job_id: str
) -> None:
    def failures() -> int:
        with database.read() as session:
            return jobs.get_job(session, job_id).failures

    def set_failures() -> None:
        with database.write() as session:
            session.execute(update(JobRow).values(failures=3))

    set_failures()
    keep(database, blobs, job_id, "one", 5)
    assert failures() == 0
    set_failures()
    keep(database, blobs, job_id, "one again", 5)
    assert failures() == 3
    keep(database, blobs, job_id, "two", 6)
    assert failures() == 0


def test_a_retry_goes_on_from_the_checkpoint_of_the_job_that_failed(
    database: Database, blobs: BlobStore, job_id: str
) -> None:
    digest, _ = keep(database, blobs, job_id, "kept", 7)
    with database.write() as session:
        claims.finish_failed(session, job_id, 1, {"code": "x", "detail": "y"})
        again = jobs.retry_job(session, job_id).id
        row = checkpoints.newest_checkpoint(session, again)
        assert row is not None
        assert (row.sha256, row.step, row.attempt) == (digest, 7, 0)
        session.execute(update(JobRow).where(JobRow.id == job_id).values(finished_at=now(session) - 2 * DAY))
        assert checkpoints.drop_ended(session, now(session) - DAY) == 1
    age_blobs(database)
    assert not remove_unused(database, blobs, digest)
    assert blobs.exists(digest)


def test_a_retry_of_a_job_without_a_checkpoint_begins_anew(database: Database, job_id: str) -> None:
    with database.write() as session:
        claims.finish_failed(session, job_id, 1, {"code": "x", "detail": "y"})
        again = jobs.retry_job(session, job_id).id
        assert checkpoints.newest_checkpoint(session, again) is None


def test_what_a_checkpoint_shares_with_a_reservation_is_not_removed(
    database: Database, blobs: BlobStore, job_id: str
) -> None:
    """It may be about to be published as something else."""
    entry = FileEntry("checkpoint.tar", hashlib.sha256(b"one").hexdigest(), 3, "t")
    for _ in range(2):
        with database.write() as session:
            reserve_blobs(session, [entry])
    digest, _ = keep(database, blobs, job_id, "one", 1)
    assert digest == entry.sha256
    with database.write() as session:
        assert checkpoints.drop_checkpoint(session, job_id) == digest
    assert not remove_unused(database, blobs, digest)
    with database.write() as session:
        assert end_reservation(session, digest)
    assert remove_unused(database, blobs, digest)
    assert not blobs.exists(digest)


def test_a_blob_without_a_row_is_not_removed(database: Database, blobs: BlobStore) -> None:
    digest = blobs.put_bytes(b"put before its row")
    assert not remove_unused(database, blobs, digest)
    assert blobs.exists(digest)


def test_the_sweep_keeps_the_checkpoint_of_a_job_until_a_day_after_its_end(
    database: Database, blobs: BlobStore, job_id: str
) -> None:
    digest, _ = keep(database, blobs, job_id, "kept", 1)
    age_blobs(database)
    later = timedelta(hours=-1)  # every blob of now is older than this
    sweep_blobs(database, blobs, older_than=later)
    assert blobs.exists(digest)
    with database.write() as session:
        claims.finish_failed(session, job_id, 1, {"code": "x", "detail": "y"})
    with database.write() as session:
        assert checkpoints.drop_ended(session, now(session) - DAY) == 0
        session.execute(update(JobRow).values(finished_at=now(session) - 2 * DAY))
        assert checkpoints.drop_ended(session, now(session) - DAY) == 1
        assert checkpoints.newest_checkpoint(session, job_id) is None


def test_a_job_that_is_being_cancelled_gets_no_checkpoint_and_no_numbers(
    database: Database, blobs: BlobStore, job_id: str
) -> None:
    with database.write() as session:
        jobs.request_cancel(session, job_id)
    with pytest.raises(AttemptCancelled):
        keep(database, blobs, job_id, "late", 3)
    with pytest.raises(AttemptCancelled), database.write() as session:
        job_metrics.record_metrics(session, job_id, 1, [Point(1, {"loss": 1.0})])


def test_a_step_that_is_done_again_replaces_its_numbers(database: Database, job_id: str) -> None:
    with database.write() as session:
        job_metrics.record_metrics(session, job_id, 1, [Point(step, {"loss": float(step)}) for step in range(1, 8)])
        job_metrics.record_metrics(session, job_id, 1, [Point(3, {"loss": 0.5}), Point(8, {"loss": 8.0})])
    with database.read() as session:
        found = [point for point, _ in job_metrics.metrics_after(session, job_id, 1, 3)]
        assert found == [Point(2, {"loss": 2.0}), Point(3, {"loss": 0.5}), Point(4, {"loss": 4.0})]
        assert [point.step for point in job_metrics.thinned(session, job_id, 3)] == [2, 4, 6, 8]
        assert [point.step for point in job_metrics.thinned(session, job_id, 100)] == list(range(1, 9))


@pytest.mark.parametrize("read", [job_metrics.metrics_after, job_metrics.thinned])
def test_a_job_that_is_not_there_has_no_series(database: Database, read: Any) -> None:
    arguments = (0, 10) if read is job_metrics.metrics_after else (10,)
    with pytest.raises(NotFound), database.read() as session:
        read(session, "job_0", *arguments)
