from __future__ import annotations

import hashlib
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from artifacts.errors import BlobMissing, RangeInvalid
from storage.blobs import BlobStore

DATA = bytes(range(256)) * 12_000  # about 3 MB: several chunks


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def staged(folder: Path, data: bytes, name: str = "staged") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.fixture(params=["file", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """An empty store of each kind."""
    if request.param == "file":
        return BlobStore((tmp_path / "store").as_uri())
    if request.param == "memory":
        return BlobStore("memory://")
    return BlobStore(f"s3://{request.getfixturevalue('s3_bucket')}/some/prefix")


def test_a_file_comes_back(store: BlobStore, tmp_path: Path) -> None:
    digest = sha256(DATA)
    assert not store.exists(digest)
    assert store.put_file(staged(tmp_path, DATA), digest) == len(DATA)
    assert store.exists(digest)
    assert store.size(digest) == len(DATA)
    chunks = list(store.stream(digest))
    assert b"".join(chunks) == DATA
    assert (len(chunks) > 1) == (store.url != "memory://")
    assert list(store.iter_digests()) == [digest]


def test_bytes_come_back(store: BlobStore) -> None:
    for data in (b"", b"x", b"some log\n" * 1000):
        digest = store.put_bytes(data)
        assert digest == sha256(data)
        assert b"".join(store.stream(digest)) == data
        assert store.size(digest) == len(data)


def test_putting_again_changes_nothing(store: BlobStore, tmp_path: Path) -> None:
    digest = sha256(DATA)
    for number in range(3):
        assert store.put_file(staged(tmp_path, DATA, f"copy-{number}"), digest) == len(DATA)
    assert store.put_bytes(DATA) == digest
    assert [blob.size for blob in store.iter_blobs()] == [len(DATA)]
    assert b"".join(store.stream(digest)) == DATA


@pytest.mark.parametrize(
    ("start", "end"),
    [(0, 1), (0, 10), (5, 10), (5, None), (len(DATA) - 1, None), (0, 10**12), (7, 7), (len(DATA), None)],
)
def test_ranges(store: BlobStore, start: int, end: int | None) -> None:
    digest = store.put_bytes(DATA)
    assert b"".join(store.stream(digest, start, end)) == DATA[start:end]


@pytest.mark.parametrize(("start", "end"), [(-1, None), (len(DATA) + 1, None), (5, 4), (0, -1)])
def test_ranges_outside_are_refused_before_any_byte(store: BlobStore, start: int, end: int | None) -> None:
    digest = store.put_bytes(DATA)
    with pytest.raises(RangeInvalid):
        store.stream(digest, start, end)


@pytest.mark.parametrize("digest", ["0" * 64, "", "../../etc/passwd", "A" * 64, "0" * 63 + "/"])
def test_a_missing_blob_is_missing_everywhere(store: BlobStore, tmp_path: Path, digest: str) -> None:
    assert not store.exists(digest)
    for call in (store.size, store.stream, lambda missing: store.materialize(missing, tmp_path / "cache")):
        with pytest.raises(BlobMissing):
            call(digest)
    store.delete("0" * 64)


def test_a_deleted_blob_is_gone(store: BlobStore) -> None:
    digest, kept = store.put_bytes(DATA), store.put_bytes(b"kept")
    store.delete(digest)
    assert not store.exists(digest)
    assert list(store.iter_digests()) == [kept]


def test_deleting_by_age_spares_what_was_put_since(store: BlobStore) -> None:
    digest = store.put_bytes(DATA)
    assert not store.delete_if_older(digest, datetime.now(UTC) - timedelta(minutes=5))
    assert store.exists(digest)
    assert store.delete_if_older(digest, datetime.now(UTC) + timedelta(minutes=5))
    assert not store.delete_if_older(digest, datetime.now(UTC) + timedelta(minutes=5))
    assert not store.exists(digest)


def test_materialize_gives_a_local_file_and_gives_it_again(store: BlobStore, tmp_path: Path) -> None:
    digest, cache = store.put_bytes(DATA), tmp_path / "cache"
    first = store.materialize(digest, cache)
    assert first.read_bytes() == DATA
    assert store.materialize(digest, cache) == first
    assert store.staging_dir is not None or [path.name for path in first.parent.iterdir()] == [digest]


def test_a_bad_cache_entry_is_downloaded_again(tmp_path: Path) -> None:
    store, cache = BlobStore("memory://"), tmp_path / "cache"
    digest = store.put_bytes(DATA)
    path = store.materialize(digest, cache)
    path.chmod(0o644)
    path.write_bytes(DATA[:-1] + b"!")
    assert store.materialize(digest, cache).read_bytes() == DATA


def test_check_passes(store: BlobStore) -> None:
    store.check()


def test_writers_at_once_agree(store: BlobStore, tmp_path: Path) -> None:
    digest, errors = sha256(DATA), []
    gate = threading.Barrier(4)

    def work(number: int) -> None:
        path = staged(tmp_path / str(number), DATA)
        gate.wait()
        try:
            store.put_file(path, digest)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(store.iter_digests()) == [digest]
    assert b"".join(store.stream(digest)) == DATA
