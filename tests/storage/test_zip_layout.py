"""The laid-out zip, read back by the standard library, up to sizes that only zip64 can say."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from storage.blobs import BlobStore
from storage.segments import BlobSlice, Segment, read_segments, total_size
from storage.zip_layout import blob_entry, bytes_entry, lay_out_zip


def join(segments: Sequence[Segment]) -> bytes:
    return b"".join(segment for segment in segments if isinstance(segment, bytes))


def test_the_standard_library_reads_it() -> None:
    contents = {"adapter_config.json": b"{}", "größe.txt": b"\xff" * 1000, "empty": b""}
    data = join(lay_out_zip([bytes_entry(name, value) for name, value in contents.items()]))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert {info.filename: archive.read(info) for info in archive.infolist()} == contents
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.external_attr >> 16 for info in archive.infolist()} == {0o100644}
    assert data == join(lay_out_zip([bytes_entry(name, value) for name, value in contents.items()]))


def test_an_archive_of_nothing() -> None:
    with zipfile.ZipFile(io.BytesIO(join(lay_out_zip([])))) as archive:
        assert archive.namelist() == []


class Virtual(io.RawIOBase):
    """The laid-out file with zeros in place of every blob: gigabytes that are nowhere."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self.position = 0
        self.size = total_size(segments)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = offset + {0: 0, 1: self.position, 2: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self.size - self.position, 1 << 20))
        base, data = 0, bytearray(count)
        for segment in self.segments:
            if isinstance(segment, bytes):
                begin, end = max(self.position, base), min(self.position + count, base + len(segment))
                if begin < end:
                    data[begin - self.position : end - self.position] = segment[begin - base : end - base]
            base += len(segment)
        buffer[:count] = data
        self.position += count
        return count


def test_entries_and_offsets_beyond_four_gib() -> None:
    big = 5 * 1024**3
    segments = lay_out_zip(
        [blob_entry("big", "0" * 64, big, 123), bytes_entry("far", b"found"), bytes_entry("farther", b"too")]
    )
    with zipfile.ZipFile(io.BufferedReader(Virtual(segments))) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        assert (infos["big"].file_size, infos["big"].compress_size, infos["big"].CRC) == (big, big, 123)
        assert infos["far"].header_offset > big
        assert archive.read("far") == b"found"
        assert archive.read("farther") == b"too"
        with archive.open("big") as file:
            assert file.read(10) == bytes(10)


def test_a_size_that_fits_exactly_needs_no_zip64() -> None:
    segments = lay_out_zip([blob_entry("a", "0" * 64, 0xFFFFFFFE, 1)])
    with zipfile.ZipFile(io.BufferedReader(Virtual(segments))) as archive:
        assert archive.infolist()[0].file_size == 0xFFFFFFFE
        assert archive.infolist()[0].extra == b""


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[tuple[BlobStore, str, bytes]]:
    store = BlobStore((tmp_path / "blobs").as_uri())
    data = bytes(range(256)) * 40
    yield store, store.put_bytes(data), data


def test_segments_read_any_range(blobs: tuple[BlobStore, str, bytes]) -> None:
    store, digest, data = blobs
    assert digest == hashlib.sha256(data).hexdigest()
    segments: list[Segment] = [b"head", BlobSlice(digest, 100, 5000), b"", b"middle", BlobSlice(digest, 0, len(data))]
    whole = b"head" + data[100:5000] + b"middle" + data
    assert total_size(segments) == len(whole)
    for start, stop in ((0, len(whole)), (0, 1), (3, 5), (4, 4904), (4900, 4920), (len(whole) - 1, len(whole)), (7, 7)):
        assert b"".join(read_segments(store, segments, start, stop)) == whole[start:stop]
