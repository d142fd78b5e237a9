"""Uploads in pieces in the database: of two appends at one place one counts, and no sweep takes a piece away."""

from __future__ import annotations

import hashlib
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from artifacts.errors import NotFound, QuotaExceeded, StateConflict, UploadOffsetMismatch
from artifacts.manifest import FileEntry
from storage import uploads
from storage.blob_rows import end_reservation, reserve_blobs
from storage.blobs import BlobStore
from storage.database import Database
from storage.sweep import remove_unused, sweep_blobs
from storage.tables import UploadSegmentRow

DAY = timedelta(days=1)
DIGEST = hashlib.sha256(b"piece").hexdigest()


def reserve(database: Database, times: int = 1) -> None:
    for _ in range(times):
        with database.write() as session:
            reserve_blobs(session, [FileEntry("x", DIGEST, 5, "t")])


def begin(database: Database, lifetime: timedelta = DAY) -> str:
    with database.write() as session:
        row = uploads.create_upload(
            session, created_by=None, file_name="x", form={}, length=10, sha256="0" * 64, lifetime=lifetime
        )
        return row.id


def test_of_many_appends_at_one_place_one_counts(database: Database) -> None:
    upload = begin(database)
    reserve(database, 6)
    outcomes: list[str] = []

    def append() -> None:
        try:
            with database.write() as session:
                uploads.add_segment(session, upload, 0, 5, DIGEST, DAY)
            outcomes.append("counted")
        except UploadOffsetMismatch as error:
            outcomes.append(f"go on at {error.expected}")

    threads = [threading.Thread(target=append) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["counted"] + 5 * ["go on at 5"]
    with database.read() as session:
        assert [(item.start, item.size) for item in uploads.segments_of(session, upload)] == [(0, 5)]


def test_no_sweep_takes_the_pieces_of_an_open_upload(database: Database, tmp_path: Path) -> None:
    blobs = BlobStore((tmp_path / "blobs").as_uri())
    assert blobs.put_bytes(b"piece") == DIGEST
    upload = begin(database)
    reserve(database)
    with database.write() as session:
        uploads.add_segment(session, upload, 0, 5, DIGEST, DAY)
    at_once = timedelta(seconds=-1)
    assert sweep_blobs(database, blobs, older_than=at_once).deleted == ()
    assert not remove_unused(database, blobs, DIGEST)
    assert blobs.exists(DIGEST)
    with database.write() as session:
        row = uploads.get_upload(session, upload, owner=None, everyones=False, lock=True)
        assert list(uploads.remove(session, row)) == [DIGEST]
    assert remove_unused(database, blobs, DIGEST)
    assert not blobs.exists(DIGEST)


def test_only_those_whose_time_is_over_expire(database: Database) -> None:
    kept, over = begin(database), begin(database, timedelta(0))
    with database.write() as session:
        assert uploads.expire(session)[0] == 1
        assert uploads.expire(session)[0] == 0
    with database.read() as session:
        assert uploads.get_upload(session, kept, owner=None, everyones=False).id == kept
        with pytest.raises(NotFound):
            uploads.get_upload(session, over, owner=None, everyones=True)


@pytest.mark.parametrize("first", ["mine", "the other's"])
def test_a_piece_that_another_has_reserved_is_left(database: Database, tmp_path: Path, first: str) -> None:
    """Two uploads of the same file: one ends while the other has stored its piece, and has not counted it yet."""
    blobs = BlobStore((tmp_path / "blobs").as_uri())
    mine, other = begin(database), begin(database)
    reserve(database, 1 if first == "mine" else 2)
    blobs.put_bytes(b"piece")
    with database.write() as session:
        uploads.add_segment(session, mine, 0, 5, DIGEST, DAY)
    if first == "mine":
        reserve(database)
        blobs.put_bytes(b"piece")
    with database.write() as session:
        uploads.remove(session, uploads.get_upload(session, mine, owner=None, everyones=False, lock=True))
    assert not remove_unused(database, blobs, DIGEST)
    with database.write() as session:
        uploads.add_segment(session, other, 0, 5, DIGEST, DAY)
    assert blobs.exists(DIGEST)
    with database.write() as session:
        uploads.remove(session, uploads.get_upload(session, other, owner=None, everyones=False, lock=True))
    assert remove_unused(database, blobs, DIGEST), "both have ended"
    assert not blobs.exists(DIGEST)


def test_a_piece_that_was_swept_before_it_counted_is_sent_again(database: Database) -> None:
    upload = begin(database)
    with pytest.raises(StateConflict, match="removed before they counted"), database.write() as session:
        uploads.add_segment(session, upload, 0, 5, DIGEST, DAY)
    with database.read() as session:
        assert uploads.get_upload(session, upload, owner=None, everyones=False).received == 0
        assert uploads.segments_of(session, upload) == []


def test_a_reference_that_is_not_committed_yet_is_waited_for(database: Database, tmp_path: Path) -> None:
    blobs = BlobStore((tmp_path / "blobs").as_uri())
    blobs.put_bytes(b"piece")
    reserve(database)
    upload = begin(database)
    with database.write() as session:
        assert end_reservation(session, DIGEST)
    removed: list[bool] = []
    thread = threading.Thread(target=lambda: removed.append(remove_unused(database, blobs, DIGEST)))
    with database.write() as session:
        session.add(UploadSegmentRow(upload_id=upload, start=0, size=5, sha256=DIGEST))
        session.flush()
        thread.start()
        while not database.is_sqlite and not session.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")):
            session.execute(text("SELECT pg_sleep(0.02)"))
    thread.join()
    assert removed == [False]
    assert blobs.exists(DIGEST)


def test_expired_uploads_are_not_open(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_OPEN", 1)
    begin(database, timedelta(0))
    begin(database)
    with pytest.raises(QuotaExceeded):
        begin(database)
