"""The cache of CRC-32: computed once, kept over a restart, never trusted when damaged."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import BlobMissing
from storage.blobs import BlobStore
from storage.checksums import Crc32Cache


class Counting(BlobStore):
    """Counts how often a blob is read."""

    reads = 0

    def stream(self, *arguments: Any, **named: Any) -> Any:
        self.reads += 1
        return super().stream(*arguments, **named)


@pytest.fixture
def store(tmp_path: Path) -> Counting:
    return Counting((tmp_path / "blobs").as_uri())


def test_each_blob_is_read_once(store: Counting, tmp_path: Path) -> None:
    data = b"adapter" * 1000
    digest = store.put_bytes(data)
    cache = Crc32Cache(store, tmp_path / "crc32")
    assert cache.get(digest) == cache.get(digest) == zlib.crc32(data)
    assert Crc32Cache(store, tmp_path / "crc32").get(digest) == zlib.crc32(data)
    assert store.reads == 1


def test_a_damaged_entry_is_computed_again(store: Counting, tmp_path: Path) -> None:
    digest = store.put_bytes(b"x")
    Crc32Cache(store, tmp_path / "crc32").get(digest)
    (tmp_path / "crc32" / digest[:2] / digest).write_text("")
    assert Crc32Cache(store, tmp_path / "crc32").get(digest) == zlib.crc32(b"x")
    assert store.reads == 2


def test_a_folder_that_can_not_be_written_costs_only_time(store: Counting, tmp_path: Path) -> None:
    digest = store.put_bytes(b"x")
    (tmp_path / "file").write_bytes(b"")
    cache = Crc32Cache(store, tmp_path / "file")
    cache.put(digest, zlib.crc32(b"x"))
    assert cache.get(digest) == zlib.crc32(b"x")


def test_a_missing_blob_is_an_error(store: Counting, tmp_path: Path) -> None:
    with pytest.raises(BlobMissing):
        Crc32Cache(store, tmp_path / "crc32").get("0" * 64)
