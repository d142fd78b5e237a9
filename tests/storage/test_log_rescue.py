"""Logs whose machine was lost."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import update

from artifacts.errors import BlobStoreUnavailable
from storage import claims, job_logs, jobs, log_rescue
from storage.blobs import BlobStore
from storage.database import Database
from storage.job_logs import Piece
from storage.log_rescue import rescue_logs
from storage.log_text import mark
from storage.tables import JobAttemptRow


def lost_log(database: Database, *pieces: Piece, hours: float = 2.0) -> tuple[str, int]:
    """An attempt that wrote this and ended so long ago."""
    with database.write() as session:
        jobs.create_job(session, "merge", {})
        claim = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=600)
        assert claim is not None
        job_logs.append_pieces(session, claim.job_id, claim.attempt, pieces)
        claims.finish_failed(session, claim.job_id, claim.attempt, {"code": "lease_expired", "detail": "silent"})
        ended = session.get_one(JobAttemptRow, (claim.job_id, claim.attempt), populate_existing=True).finished_at
        assert ended is not None
        session.execute(
            update(JobAttemptRow)
            .where(JobAttemptRow.job_id == claim.job_id)
            .values(finished_at=ended - timedelta(hours=hours))
        )
    return claim.job_id, claim.attempt


def kept(database: Database, blobs: BlobStore, key: tuple[str, int]) -> bytes | None:
    with database.read() as session:
        sha256 = job_logs.log_state(session, *key).sha256
    return None if sha256 is None else b"".join(blobs.stream(sha256))


def live(database: Database) -> int:
    with database.read() as session:
        return job_logs.live_bytes(session)


def test_what_had_reached_the_database_is_kept(database: Database, blobs: BlobStore) -> None:
    key = lost_log(database, Piece(0, "zwölf\n"), Piece(7, "two\n"), Piece(100, "end\n"))
    assert rescue_logs(database, blobs) == 1
    assert kept(database, blobs, key) == f"zwölf\ntwo\n{mark(89)}end\n".encode()
    assert live(database) == 0
    assert rescue_logs(database, blobs) == 0


def test_a_machine_may_still_come_back(database: Database, blobs: BlobStore) -> None:
    key = lost_log(database, Piece(0, "one\n"), hours=0.5)
    assert rescue_logs(database, blobs) == 0
    assert kept(database, blobs, key) is None
    assert live(database) == 4


def test_an_attempt_that_runs_is_left_alone(database: Database, blobs: BlobStore) -> None:
    with database.write() as session:
        jobs.create_job(session, "merge", {})
        claim = claims.claim_next(session, server_id="srv", boot_id="boot", slot="cpu:0", lease_seconds=600)
        assert claim is not None
        job_logs.append_pieces(session, claim.job_id, claim.attempt, [Piece(0, "one\n")])
    assert rescue_logs(database, blobs, timedelta(hours=-1)) == 0
    assert live(database) == 4


def test_a_whole_log_is_not_replaced_by_a_part(database: Database, blobs: BlobStore) -> None:
    key = lost_log(database, Piece(0, "one\n"))
    with database.write() as session:
        claims.record_log(session, *key, blobs.put_bytes(b"one\ntwo\n"))
    assert rescue_logs(database, blobs) == 1
    assert kept(database, blobs, key) == b"one\ntwo\n"
    assert live(database) == 0


def test_more_than_one_batch(database: Database, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_rescue, "_BATCH", 2)
    keys = [lost_log(database, Piece(0, f"{number}\n")) for number in range(5)]
    assert rescue_logs(database, blobs) == 5
    assert [kept(database, blobs, key) for key in keys] == [f"{number}\n".encode() for number in range(5)]


def test_an_outage_loses_nothing(database: Database, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    lost_log(database, Piece(0, "one\n"))

    def fail(data: bytes) -> str:
        raise BlobStoreUnavailable("away")

    monkeypatch.setattr(blobs, "put_bytes", fail)
    with pytest.raises(BlobStoreUnavailable):
        rescue_logs(database, blobs)
    assert live(database) == 4
