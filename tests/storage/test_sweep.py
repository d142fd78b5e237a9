from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from artifacts.manifest import AdapterManifest, FileEntry
from storage import adapters, claims, datasets, jobs, local_blobs
from storage.adapters import Parent
from storage.blobs import BlobStore, key_of
from storage.database import Database, now
from storage.sweep import sweep_blobs
from storage.tables import AdapterFileRow, AdapterRow, BlobRow, DatasetRow, LineageRow

Make = Callable[..., AdapterManifest]
DAY = timedelta(hours=24)


@pytest.fixture
def age(database: Database, blobs: BlobStore, tmp_path: Path) -> Callable[[], None]:
    """Makes everything that is there now two days older, deletions included."""

    def make_older() -> None:
        with database.write() as session:
            moment = now(session) - 2 * DAY
            session.execute(update(BlobRow).values(created_at=moment))
            for table in (AdapterRow, DatasetRow):
                session.execute(update(table).where(table.deleted_at.is_not(None)).values(deleted_at=moment))
        for digest in blobs.iter_digests():
            os.utime(tmp_path / "blob-store" / key_of(digest), (moment.timestamp(), moment.timestamp()))

    return make_older


@pytest.fixture
def add(database: Database, blobs: BlobStore, make_manifest: Make) -> Callable[..., str]:
    """Adds an adapter with one file of its own and gives its id."""

    def add_adapter(content: str, **options: Any) -> str:
        digest = blobs.put_bytes(content.encode())
        manifest = make_manifest(content, files=(FileEntry("adapter_model.safetensors", digest, len(content), "t"),))
        with database.write() as session:
            return adapters.add_adapter(session, manifest, name=content, **options)[0].id

    return add_adapter


def delete(database: Database, adapter_id: str) -> None:
    with database.write() as session:
        adapters.delete_adapter(session, adapter_id)


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_only_old_blobs_that_nothing_refers_to_go(
    database: Database, blobs: BlobStore, age: Callable[[], None], add: Callable[..., str]
) -> None:
    adapter_id = add("live")
    orphan = blobs.put_bytes(b"orphan")
    age()
    fresh = blobs.put_bytes(b"fresh orphan")
    report = sweep_blobs(database, blobs)
    assert (report.scanned, report.deleted, report.bytes_freed) == (3, (orphan,), 6)
    assert (report.dry_run, report.adapters_forgotten) == (False, 0)
    assert set(blobs.iter_digests()) == {sha256("live"), fresh}
    with database.read() as session:
        assert adapters.get_adapter(session, adapter_id).files[0].sha256 == sha256("live")
    assert sweep_blobs(database, blobs).deleted == ()


def test_a_dry_run_tells_the_same_and_changes_nothing(
    database: Database, blobs: BlobStore, age: Callable[[], None], add: Callable[..., str]
) -> None:
    delete(database, add("deleted"))
    blobs.put_bytes(b"orphan")
    age()
    before = sorted(blobs.iter_digests())
    planned = sweep_blobs(database, blobs, dry_run=True)
    assert planned.dry_run
    assert sorted(blobs.iter_digests()) == before
    with database.read() as session:
        assert len(session.scalars(select(AdapterFileRow)).all()) == 1
    done = sweep_blobs(database, blobs)
    assert (planned.deleted, planned.bytes_freed, planned.adapters_forgotten) == (
        done.deleted,
        done.bytes_freed,
        done.adapters_forgotten,
    )
    assert list(blobs.iter_digests()) == []


def test_a_deleted_adapter_keeps_its_bytes_for_a_day(
    database: Database, blobs: BlobStore, age: Callable[[], None], add: Callable[..., str]
) -> None:
    adapter_id = add("deleted")
    age()
    delete(database, adapter_id)
    assert sweep_blobs(database, blobs).deleted == ()
    age()
    report = sweep_blobs(database, blobs)
    assert (report.deleted, report.adapters_forgotten) == ((sha256("deleted"),), 1)
    with database.read() as session:
        for table in (AdapterRow, AdapterFileRow, BlobRow):
            assert session.scalars(select(table)).all() == []


def test_a_blob_that_a_live_adapter_shares_with_a_deleted_one_stays(
    database: Database, blobs: BlobStore, age: Callable[[], None], make_manifest: Make
) -> None:
    digest = blobs.put_bytes(b"shared")
    ids = []
    for content in ("a", "b"):
        with database.write() as session:
            manifest = make_manifest(content, files=(FileEntry("adapter_config.json", digest, 6, "t"),))
            ids.append(adapters.add_adapter(session, manifest, name=content)[0].id)
    delete(database, ids[0])
    age()
    report = sweep_blobs(database, blobs)
    assert (report.deleted, report.adapters_forgotten) == ((), 1)
    assert blobs.exists(digest)


def test_an_ancestor_keeps_its_row_and_loses_its_bytes(
    database: Database, blobs: BlobStore, age: Callable[[], None], add: Callable[..., str]
) -> None:
    parent = add("parent")
    child = add("child", parents=[Parent(parent, {"weight": 1})])
    delete(database, parent)
    age()
    assert sweep_blobs(database, blobs).deleted == (sha256("parent"),)
    with database.read() as session:
        graph = adapters.lineage(session, child)
        assert [row.name for row in graph.nodes] == ["parent", "child"]
        assert adapters.get_adapter(session, parent, deleted=True).files == []
    assert sweep_blobs(database, blobs).adapters_forgotten == 0


def test_a_deleted_family_goes_from_the_leaves_up(
    database: Database, blobs: BlobStore, age: Callable[[], None], add: Callable[..., str]
) -> None:
    first = add("first")
    second = add("second", parents=[Parent(first)])
    third = add("third", parents=[Parent(second), Parent(first)])
    for adapter_id in (first, second, third):
        delete(database, adapter_id)
    age()
    assert sweep_blobs(database, blobs).adapters_forgotten == 3
    with database.read() as session:
        assert session.scalars(select(AdapterRow)).all() == []
        assert session.scalars(select(LineageRow)).all() == []


def test_an_adapter_that_a_waiting_job_needs_keeps_its_bytes(
    database: Database, blobs: BlobStore, age: Callable[[], None], add: Callable[..., str]
) -> None:
    adapter_id = add("needed")
    with database.write() as session:
        job = jobs.create_job(session, "merge", {"adapters": [{"id": adapter_id, "weight": 1.0}]})
    delete(database, adapter_id)
    age()
    assert sweep_blobs(database, blobs).deleted == ()
    with database.write() as session:
        jobs.request_cancel(session, job.id)
    assert sweep_blobs(database, blobs).deleted == (sha256("needed"),)


def test_logs_and_datasets_stay(database: Database, blobs: BlobStore, age: Callable[[], None]) -> None:
    log, data = blobs.put_bytes(b"log"), blobs.put_bytes(b"data")
    with database.write() as session:
        adapters.reserve_blobs(session, [FileEntry("d", data, 4, "t"), FileEntry("l", log, 3, "t")])
        job = jobs.create_job(session, "merge", {})
        claims.claim_next(session, server_id="s", boot_id="b", slot="c", lease_seconds=60)
        claims.record_log(session, job.id, 1, log)
        datasets.add_dataset(session, name="d", format="jsonl", sha256=data, size=4, rows=1, columns=[])
    age()
    assert sweep_blobs(database, blobs).deleted == ()
    assert set(blobs.iter_digests()) == {log, data}


def test_a_deleted_dataset_goes_with_its_row_unless_a_job_needs_it(
    database: Database, blobs: BlobStore, age: Callable[[], None]
) -> None:
    ids, digests = [], [blobs.put_bytes(text) for text in (b"kept", b"needed", b"deleted")]
    with database.write() as session:
        for digest in digests:
            row, _ = datasets.add_dataset(session, name="d", format="csv", sha256=digest, size=4, rows=1, columns=[])
            ids.append(row.id)
    for dataset_id in ids[1:]:
        with database.write() as session:
            datasets.delete_dataset(session, dataset_id)
    assert sweep_blobs(database, blobs).datasets_forgotten == 0, "it was deleted just now"
    with database.write() as session:  # as a job would that was submitted in the moment of the deletion
        job = jobs.create_job(session, "train", {"dataset": ids[1]})
    age()
    planned = sweep_blobs(database, blobs, dry_run=True)
    report = sweep_blobs(database, blobs)
    assert planned.datasets_forgotten == report.datasets_forgotten == 1
    assert planned.deleted == report.deleted == (digests[2],)
    with database.write() as session:
        assert set(session.scalars(select(DatasetRow.id))) == set(ids[:2])
        jobs.request_cancel(session, job.id)
    assert sweep_blobs(database, blobs).deleted == (digests[1],)
    assert set(blobs.iter_digests()) == {digests[0]}


def test_a_reserved_blob_stays_until_the_reservation_is_old(
    database: Database, blobs: BlobStore, age: Callable[[], None]
) -> None:
    digest = blobs.put_bytes(b"uploading")
    age()
    with database.write() as session:
        adapters.reserve_blobs(session, [FileEntry("x", digest, 9, "t")])
    assert sweep_blobs(database, blobs).deleted == ()
    age()
    assert sweep_blobs(database, blobs).deleted == (digest,)
    with database.read() as session:
        assert session.scalars(select(BlobRow)).all() == []


def test_a_blob_taken_up_after_it_was_marked_stays(
    database: Database,
    blobs: BlobStore,
    age: Callable[[], None],
    add: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An upload of the same bytes arrives after the sweep has decided and before it deletes."""
    blobs.put_bytes(b"again")
    age()
    listed = BlobStore.iter_blobs

    def list_then_upload(store: BlobStore) -> Any:
        yield from listed(store)
        monkeypatch.undo()
        add("again")
        age()  # even if its date says nothing: the row that refers to it is enough

    monkeypatch.setattr(BlobStore, "iter_blobs", list_then_upload)
    assert sweep_blobs(database, blobs).deleted == ()
    assert blobs.exists(sha256("again"))


def test_uploads_during_sweeps_lose_nothing(
    database: Database, blobs: BlobStore, age: Callable[[], None], make_manifest: Make
) -> None:
    """Orphans are uploaded again while sweeps run: every adapter that was added has its bytes."""
    contents = [f"content {number}" for number in range(12)]
    for content in contents:
        blobs.put_bytes(content.encode())
    age()
    errors: list[BaseException] = []
    gate = threading.Barrier(3)

    def upload(mine: list[str]) -> None:
        gate.wait()
        try:
            for content in mine:
                file = FileEntry("adapter_model.safetensors", sha256(content), len(content), "t")
                with database.write() as session:
                    adapters.reserve_blobs(session, [file])
                blobs.put_bytes(content.encode())
                with database.write() as session:
                    adapters.add_adapter(session, make_manifest(content, files=(file,)), name=content)
        except BaseException as error:
            errors.append(error)

    def sweep() -> None:
        gate.wait()
        try:
            for _ in range(3):
                sweep_blobs(database, blobs)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=upload, args=(contents[:6],)),
        threading.Thread(target=upload, args=(contents[6:],)),
        threading.Thread(target=sweep),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert {sha256(content) for content in contents} == set(blobs.iter_digests())


def test_abandoned_uploads_are_removed(database: Database, blobs: BlobStore) -> None:
    assert blobs.staging_dir is not None
    old = blobs.staging_dir / "upload-1"
    old.mkdir()
    (old / "part").write_bytes(b"x")
    for path in (old / "part", old):
        os.utime(path, (0, 0))
    (blobs.staging_dir / "upload-2").mkdir()
    assert sweep_blobs(database, blobs, dry_run=True).staging_removed == 1
    assert sweep_blobs(database, blobs).staging_removed == 1
    assert [path.name for path in blobs.staging_dir.iterdir()] == ["upload-2"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_upload_that_ends_while_staging_is_swept(
    database: Database, blobs: BlobStore, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its staged file goes away between being listed and being looked at."""
    assert blobs.staging_dir is not None
    upload = blobs.staging_dir / "upload-1"
    if kind == "file":
        upload.write_bytes(b"x")
    else:
        upload.mkdir()
    (blobs.staging_dir / "upload-2").write_bytes(b"x")
    os.utime(blobs.staging_dir / "upload-2", (0, 0))
    newest = local_blobs._newest

    def ends_first(entry: Path) -> float:
        if entry == upload:
            entry.rmdir() if kind == "folder" else entry.unlink()
        return newest(entry)

    monkeypatch.setattr(local_blobs, "_newest", ends_first)
    assert sweep_blobs(database, blobs).staging_removed == 1
    assert list(blobs.staging_dir.iterdir()) == []


@pytest.mark.s3
def test_a_sweep_of_s3(database: Database, s3_bucket: str) -> None:
    store = BlobStore(f"s3://{s3_bucket}/prefix")
    digest = store.put_bytes(b"orphan")
    assert sweep_blobs(database, store).deleted == ()
    assert sweep_blobs(database, store, older_than=timedelta(minutes=-5)).deleted == (digest,)
    assert list(store.iter_digests()) == []
