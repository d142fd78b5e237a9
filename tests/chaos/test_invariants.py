"""The invariants themselves: a database in which all is well breaks none, and each planted fault is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaos_disk import Disk
from chaos_invariants import Expected, check_blobs, check_folders, check_outcome, check_rows
from chaos_plan import canaries, make_plan
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from storage import claims, jobs
from storage.blobs import BlobStore
from storage.tables import AdapterRow, BlobRow, JobAttemptRow, JobEventRow, JobLogRow, JobQueueRow, JobRow

ERROR = {"code": "worker_crashed", "detail": "x"}


def claim(session: Session) -> claims.Claim:
    claimed = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=60)
    assert claimed is not None
    return claimed


@pytest.fixture
def ended(pool: Any, add_adapter: Any) -> str:
    """The id of a merge that succeeded in its second attempt, beside one that failed and one that was cancelled."""
    adapter = add_adapter("a", 1)
    with pool.database.write() as session:
        job_id = jobs.create_job(session, "merge", {}).id
        claim(session)
        claims.requeue(session, job_id, 1, delay_seconds=0, error=ERROR, exit=None)
    with pool.database.write() as session:
        claim(session)
        claims.record_progress(session, job_id, 2, fraction=0.5, message="half way")
        session.execute(update(AdapterRow).where(AdapterRow.id == adapter).values(job_id=job_id))
        claims.finish_succeeded(session, job_id, 2, {"adapters": [adapter], "images": [], "report": {}})
        failing = jobs.create_job(session, "quiet", {}).id
        claim(session)
        claims.finish_failed(session, failing, 1, ERROR)
        cancelled = jobs.create_job(session, "quiet", {}).id
        jobs.request_cancel(session, cancelled)
    return job_id


def rules(pool: Any) -> set[str]:
    with pool.database.read() as session:
        return {violation.rule for violation in check_rows(session)}


def test_where_all_is_well_nothing_is_found(pool: Any, ended: str) -> None:
    assert rules(pool) == set()


def _second_success(session: Session, job_id: str) -> None:
    session.execute(update(JobAttemptRow).where(JobAttemptRow.attempt == 1).values(outcome="succeeded"))


def _result_of_another_attempt(session: Session, job_id: str) -> None:
    job = session.get_one(JobRow, job_id)
    job.result = {**(job.result or {}), "report": {"attempt": 1}}


def _progress_of_another_attempt(session: Session, job_id: str) -> None:
    event = session.get_one(JobEventRow, (job_id, 5))
    assert event.type == "progress"
    event.data = {**event.data, "attempt": 1}


def _second_adapter(session: Session, job_id: str) -> None:
    session.execute(update(JobRow).where(JobRow.id == job_id).values(result={"adapters": [], "report": {}}))


def _gap(session: Session, job_id: str) -> None:
    session.execute(delete(JobEventRow).where(JobEventRow.job_id == job_id, JobEventRow.sequence == 4))


def _missing_last_event(session: Session, job_id: str) -> None:
    session.execute(update(JobRow).where(JobRow.id == job_id).values(last_event=JobRow.last_event + 1))


def _state_after_the_end(session: Session, job_id: str) -> None:
    job = session.get_one(JobRow, job_id)
    data = {"state": "queued", "attempt": 2}
    session.add(
        JobEventRow(
            job_id=job_id,
            sequence=job.last_event + 1,
            type="state",
            data=data,
            created_at=job.finished_at or job.created_at,
        )
    )
    job.last_event += 1


def _progress_after_the_end(session: Session, job_id: str) -> None:
    job = session.get_one(JobRow, job_id)
    session.add(
        JobEventRow(
            job_id=job_id, sequence=job.last_event + 1, type="progress", data={"attempt": 2}, created_at=job.created_at
        )
    )
    job.last_event += 1


def _stuck(session: Session, job_id: str) -> None:
    jobs.create_job(session, "quiet", {})


def _cancelled_that_failed(session: Session, job_id: str) -> None:
    session.execute(update(JobRow).where(JobRow.state == "failed").values(cancel_requested=True))


def _lease_left(session: Session, job_id: str) -> None:
    session.execute(update(JobRow).where(JobRow.id == job_id).values(boot_id="boot"))


def _counter(session: Session, job_id: str) -> None:
    session.execute(update(JobQueueRow).values(running=1))


def _bug(session: Session, job_id: str) -> None:
    session.execute(update(JobRow).where(JobRow.state == "failed").values(error={"code": "internal_error"}))


def _open_attempt(session: Session, job_id: str) -> None:
    session.execute(update(JobAttemptRow).where(JobAttemptRow.attempt == 1).values(outcome=None))


def _attempt_without_a_row(session: Session, job_id: str) -> None:
    session.execute(delete(JobAttemptRow).where(JobAttemptRow.job_id == job_id, JobAttemptRow.attempt == 1))


def _log_left(session: Session, job_id: str) -> None:
    job = session.get_one(JobRow, job_id)
    session.add(JobLogRow(job_id=job_id, attempt=2, sequence=0, text="x", created_at=job.created_at))


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        (_second_success, "no job publishes twice"),
        (_second_adapter, "no job publishes twice"),
        (_result_of_another_attempt, "a stale attempt writes nothing"),
        (_progress_of_another_attempt, "a stale attempt writes nothing"),
        (_gap, "event sequences have no gaps"),
        (_missing_last_event, "event sequences have no gaps"),
        (_state_after_the_end, "terminal states never change"),
        (_progress_after_the_end, "terminal states never change"),
        (_stuck, "every job ends"),
        (_cancelled_that_failed, "a cancelled job is cancelled"),
        (_lease_left, "no lease without a live holder"),
        (_counter, "the counters of the queue are true"),
        (_bug, "no job meets a bug"),
        (_open_attempt, "every attempt ends"),
        (_attempt_without_a_row, "every attempt has a row"),
        (_log_left, "the log of an ended attempt is a blob"),
    ],
)
def test_a_planted_fault_is_found(pool: Any, ended: str, fault: Callable[[Session, str], None], rule: str) -> None:
    with pool.database.write() as session:
        fault(session, ended)
    assert rule in rules(pool)


def test_blobs_and_rows_that_miss_each_other_are_found(pool: Any, ended: str) -> None:
    blobs = BlobStore(pool.settings().blob_url)

    def found() -> list[str]:
        with pool.database.read() as session:
            return [violation.rule for violation in check_blobs(session, blobs)]

    assert found() == []
    orphan = blobs.put_bytes(b"nobody knows me")
    assert found() == ["no blob without a row"]
    blobs.delete(orphan)
    with pool.database.read() as session:
        blobs.delete(session.scalars(select(BlobRow.sha256)).first())
    assert set(found()) == {"no row without its blob"}


def test_what_is_left_in_folders_is_found(tmp_path: Path) -> None:
    locks, logs = tmp_path / "locks", tmp_path / "work" / "srv" / "logs"
    locks.mkdir()
    logs.mkdir(parents=True)
    assert check_folders([tmp_path], locks) == []
    (logs.parent / "job_1-1").mkdir()
    (locks / "job_1-2-one-cpu:0.conflict").touch()
    assert {item.rule for item in check_folders([tmp_path], locks)} == {
        "scratch folders are empty",
        "one process on a slot",
    }
    (logs.parent / "job_1-1").rmdir()
    (logs / "job_1-1.log").touch()
    assert [item.detail for item in check_folders([tmp_path], tmp_path)] == [str(logs)]


def test_an_end_must_have_its_cause(pool: Any, ended: str) -> None:
    failed = next(job for job in _all_jobs(pool) if job.state == "failed")
    expected = Expected("succeeded")
    assert list(check_outcome(failed, expected, calm=False))  # its surroundings failed, but not often enough
    failed.failures = claims.MAX_FAILURES + 1
    assert not list(check_outcome(failed, expected, calm=False))
    assert list(check_outcome(failed, expected, calm=True))
    assert not list(check_outcome(failed, Expected("failed", "worker_crashed", failed.failures), calm=True))


def _all_jobs(pool: Any) -> list[JobRow]:
    with pool.database.read() as session:
        return list(session.scalars(select(JobRow)))


def test_a_seed_decides_everything() -> None:
    first = make_plan(7, jobs=220, seconds=45.0, lease=2.0, restartable=True)
    assert first == make_plan(7, jobs=220, seconds=45.0, lease=2.0, restartable=True)
    assert first != make_plan(8, jobs=220, seconds=45.0, lease=2.0, restartable=True)
    assert len(first.jobs) == 220
    assert {job.kind for job in first.jobs} == {job.kind for job in canaries()} | {"gated"}
    assert {act.name for act in first.acts} == {
        "kill worker",
        "kill fork server",
        "kill server",
        "freeze",
        "fill the disk",
        "jump",
        "restart the database",
        "kill a database process",
    }


def test_a_full_disk_is_full_and_is_freed(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "disk")
    try:
        if not disk.mounted:
            pytest.skip("mounting a small file system needs root; without it, a round limits the size of files")
        disk.fill([])
        with pytest.raises(OSError, match="No space left"):
            (disk.folder / "file").write_bytes(b"x" * 65536)
        disk.free()
        (disk.folder / "file").write_bytes(b"x" * 65536)
    finally:
        disk.close()
