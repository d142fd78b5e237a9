from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import threading
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerContext
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import pytest

from artifacts.errors import BlobCorrupt, BlobStoreUnavailable, DiskFull
from storage.blobs import BlobStore

DATA = bytes(range(256)) * 12_000  # about 3 MB: several chunks


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def staged(folder: Path, data: bytes, name: str = "staged") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore((tmp_path / "a folder").as_uri())


def stored(tmp_path: Path, digest: str) -> Path:
    return tmp_path / "a folder" / "blobs" / "sha256" / digest[:2] / digest[2:4] / digest


def test_what_is_staged_is_linked_not_copied(store: BlobStore, tmp_path: Path) -> None:
    assert store.staging_dir is not None
    source = staged(store.staging_dir, DATA)
    store.put_file(source, sha256(DATA))
    target = stored(tmp_path, sha256(DATA))
    assert target.stat().st_ino == source.stat().st_ino
    assert target.stat().st_mode & 0o777 == 0o444
    source.unlink()
    assert b"".join(store.stream(sha256(DATA))) == DATA
    assert store.materialize(sha256(DATA), tmp_path / "unused") == target


def test_another_file_system_gets_a_verified_copy(store: BlobStore, small_disk: Path, tmp_path: Path) -> None:
    data = DATA[:500_000]
    source = staged(small_disk, data)
    store.put_file(source, sha256(data))
    assert stored(tmp_path, sha256(data)).read_bytes() == data
    assert list(store.staging_dir.iterdir()) == []  # type: ignore[union-attr]
    with pytest.raises(BlobCorrupt):
        store.put_file(source, "0" * 64)
    assert not store.exists("0" * 64)


def test_a_copy_is_made_where_links_are_refused(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link, source = os.link, staged(tmp_path, DATA)

    def refuse(first: Path, second: Path) -> None:
        if Path(first) == source:
            raise PermissionError(1, "Operation not permitted")
        link(first, second)

    monkeypatch.setattr(os, "link", refuse)
    store.put_file(source, sha256(DATA))
    assert stored(tmp_path, sha256(DATA)).read_bytes() == DATA
    source.write_bytes(b"changed")  # the source is still the caller's
    assert b"".join(store.stream(sha256(DATA))) == DATA


def test_a_truncated_blob_is_mended_by_the_next_put(store: BlobStore, tmp_path: Path) -> None:
    digest = store.put_bytes(DATA)
    target = stored(tmp_path, digest)
    target.chmod(0o644)
    os.truncate(target, 100)
    with pytest.raises(BlobCorrupt):
        store.materialize(digest, tmp_path)
    store.put_file(staged(tmp_path, DATA), digest)
    assert store.materialize(digest, tmp_path).read_bytes() == DATA


def test_changed_bytes_are_noticed_before_the_last_of_them_leaves(store: BlobStore, tmp_path: Path) -> None:
    digest = store.put_bytes(DATA)
    target = stored(tmp_path, digest)
    target.chmod(0o644)
    with target.open("r+b") as file:
        file.write(b"!")
    received = 0
    with pytest.raises(BlobCorrupt):
        for chunk in store.stream(digest):
            received += len(chunk)
    assert received < len(DATA)
    with pytest.raises(BlobCorrupt):
        store.materialize(digest, tmp_path)


def test_a_blob_that_was_put_again_counts_as_new(store: BlobStore, tmp_path: Path) -> None:
    digest = store.put_bytes(DATA)
    os.utime(stored(tmp_path, digest), (0, 0))
    store.put_file(staged(tmp_path, DATA), digest)
    assert not store.delete_if_older(digest, datetime.now(UTC) - timedelta(minutes=1))


def test_an_old_file_becomes_a_new_blob(store: BlobStore, tmp_path: Path) -> None:
    source = staged(tmp_path, DATA)
    os.utime(source, (0, 0))
    store.put_file(source, sha256(DATA))
    assert next(store.iter_blobs()).modified > datetime.now(UTC) - timedelta(minutes=1)


def test_a_sweep_waits_for_a_writer(store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that has found a blob renews it before a sweep may look at its age."""
    digest = store.put_bytes(DATA)
    os.utime(stored(tmp_path, digest), (0, 0))
    found, answers = threading.Event(), []
    cutoff = datetime.now(UTC) - timedelta(hours=24)
    renew, sweeper = (
        os.utime,
        threading.Thread(target=lambda: answers.append(store.delete_if_older(digest, cutoff))),
    )

    def slow_renew(path: Path) -> None:
        found.set()
        sweeper.start()
        sweeper.join(0.2)  # it must still be waiting for the lock
        assert sweeper.is_alive()
        renew(path)

    monkeypatch.setattr(os, "utime", slow_renew)
    store.put_bytes(DATA)
    sweeper.join()
    assert found.is_set()
    assert answers == [False]
    assert store.exists(digest)


def test_foreign_files_are_not_blobs(store: BlobStore, tmp_path: Path) -> None:
    digest = store.put_bytes(DATA)
    (stored(tmp_path, digest).parent / "README").write_text("not a blob")
    assert list(store.iter_digests()) == [digest]


def test_a_full_disk_is_a_full_disk_and_leaves_nothing(small_disk: Path, tmp_path: Path) -> None:
    store = BlobStore((small_disk / "store").as_uri())
    kept = store.put_bytes(b"kept")
    with pytest.raises(DiskFull):
        store.put_file(staged(tmp_path, DATA), sha256(DATA))
    with pytest.raises(DiskFull):
        store.put_bytes(DATA)
    assert not store.exists(sha256(DATA))
    assert list(store.staging_dir.iterdir()) == []  # type: ignore[union-attr]
    assert list(store.iter_digests()) == [kept]
    store.put_bytes(b"small enough")


def test_a_full_cache_is_a_full_disk(small_disk: Path) -> None:
    store = BlobStore("memory://")
    digest = store.put_bytes(DATA)
    with pytest.raises(DiskFull):
        store.materialize(digest, small_disk / "cache")
    assert [path for path in small_disk.rglob("*") if path.is_file()] == []


def test_stale_staging_is_removed_and_open_uploads_are_not(store: BlobStore) -> None:
    folder = store.staging_dir
    assert folder is not None
    staged(folder / "old-upload", b"x")
    staged(folder, b"x", "old-file")
    staged(folder / "open-upload", b"x", "first-file")
    staged(folder / "open-upload", b"x", "growing")
    for path in [*folder.rglob("*")]:
        if path.name != "growing":
            os.utime(path, (0, 0))
    cutoff = datetime.now(UTC) - timedelta(hours=1)
    assert store.remove_stale_staging(cutoff, dry_run=True) == 2
    assert store.remove_stale_staging(cutoff) == 2
    assert sorted(path.name for path in folder.iterdir()) == ["open-upload"]


@pytest.mark.parametrize("url", ["file://host/folder", "file:relative", "http://x/y", "", "s3:///none", "ftp://x/y"])
def test_urls_that_name_no_store_are_refused(url: str) -> None:
    with pytest.raises(BlobStoreUnavailable):
        BlobStore(url)


def test_a_folder_that_can_not_be_made_is_unavailable(tmp_path: Path) -> None:
    staged(tmp_path, b"in the way", "file")
    with pytest.raises(BlobStoreUnavailable, match="can not be made"):
        BlobStore((tmp_path / "file" / "store").as_uri())


def test_a_store_that_vanished_is_unavailable(store: BlobStore, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "a folder")
    with pytest.raises(BlobStoreUnavailable):
        store.check()
    with pytest.raises(BlobStoreUnavailable):
        store.put_bytes(b"x")


def _put_beyond_the_limit(url: str, source: str, answers: SimpleQueue[str]) -> None:
    """In a child that may not write large files, as a quota would have it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    store = BlobStore(url)
    try:
        store.put_bytes(Path(source).read_bytes())
        answers.put("no error")
    except Exception as error:
        answers.put(type(error).__name__)
    answers.put(str(len(list(store.iter_digests()))))


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path, processes: ForkServerContext) -> None:
    answers = processes.SimpleQueue()
    arguments = ((tmp_path / "store").as_uri(), str(staged(tmp_path, DATA)), answers)
    child = processes.Process(target=_put_beyond_the_limit, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert (answers.get(), answers.get()) == ("DiskFull", "0")
