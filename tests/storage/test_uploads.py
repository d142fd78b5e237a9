"""Uploads in pieces in the database: of two appends at one place one counts, and no sweep takes a piece away."""

from __future__ import annotations

import hashlib
import threading
from datetime import timedelta
from pathlib import Path

import pytest

from artifacts.errors import NotFound, UploadOffsetMismatch
from storage import uploads
from storage.blobs import BlobStore
from storage.database import Database
from storage.sweep import remove_unused, sweep_blobs

DAY = timedelta(days=1)
DIGEST = hashlib.sha256(b"piece").hexdigest()


def begin(database: Database, lifetime: timedelta = DAY) -> str:
    with database.write() as session:
        row = uploads.create_upload(
            session, created_by=None, file_name="x", form={}, length=10, sha256="0" * 64, lifetime=lifetime
        )
        return row.id


def test_of_many_appends_at_one_place_one_counts(database: Database) -> None:
    upload = begin(database)
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
    with database.write() as session:
        uploads.add_segment(session, upload, 0, 5, DIGEST, DAY)
    at_once = timedelta(seconds=-1)
    assert sweep_blobs(database, blobs, older_than=at_once).deleted == ()
    assert not remove_unused(database, blobs, DIGEST)
    assert blobs.exists(DIGEST)
    with database.write() as session:
        row = uploads.get_upload(session, upload, owner=None, everyones=False, lock=True)
        assert list(uploads.remove(session, row)) == [DIGEST]
    assert sweep_blobs(database, blobs, older_than=at_once).deleted == (DIGEST,)


def test_only_those_whose_time_is_over_expire(database: Database) -> None:
    kept, over = begin(database), begin(database, timedelta(0))
    with database.write() as session:
        assert uploads.expire(session)[0] == 1
        assert uploads.expire(session)[0] == 0
    with database.read() as session:
        assert uploads.get_upload(session, kept, owner=None, everyones=False).id == kept
        with pytest.raises(NotFound):
            uploads.get_upload(session, over, owner=None, everyones=True)
