"""The layout of a zip archive whose entries are stored as they are: every offset is known before a byte is read.

Format: PKWARE APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (ends),
4.5.3 (zip64 extra field). The same entries always give the same bytes, so a digest of the entries names the archive.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from storage.segments import BlobSlice, Segment

_LIMIT_32 = 0xFFFFFFFF
_LIMIT_16 = 0xFFFF
_UTF8_NAMES = 1 << 11
_DOS_DATE = (0 << 9) | (1 << 5) | 1  # 1980-01-01, the zero of the format's clock
_REGULAR_FILE_0644 = (0o100644 << 16) & _LIMIT_32
_MADE_BY_UNIX = 3 << 8


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """A file in the archive: its name, CRC-32, size in bytes and content, one part after another."""

    name: str
    crc32: int
    size: int
    content: tuple[Segment, ...]


def bytes_entry(name: str, content: bytes) -> ZipEntry:
    """An entry whose content is made here."""
    return ZipEntry(name, zlib.crc32(content), len(content), (content,))


def lay_out_zip(entries: Sequence[ZipEntry]) -> tuple[Segment, ...]:
    """The archive of `entries`, in their order; zip64 fields appear only where a size or an offset needs them."""
    segments: list[Segment] = []
    central: list[bytes] = []
    offset = 0
    for entry in entries:
        header = _local_header(entry)
        central.append(_central_header(entry, offset))
        segments += [header, *entry.content]
        offset += len(header) + entry.size
    directory = b"".join(central)
    segments.append(directory + _end_records(len(entries), len(directory), offset))
    return tuple(segments)


def _version(needs_zip64: bool) -> int:
    return 45 if needs_zip64 else 20


def _local_header(entry: ZipEntry) -> bytes:
    name = entry.name.encode("utf-8")
    big = entry.size >= _LIMIT_32
    extra = struct.pack("<HHQQ", 1, 16, entry.size, entry.size) if big else b""
    size = _LIMIT_32 if big else entry.size
    return (
        struct.pack(
            "<IHHHHHIIIHH",
            0x04034B50,
            _version(big),
            _UTF8_NAMES,
            0,
            0,
            _DOS_DATE,
            entry.crc32,
            size,
            size,
            len(name),
            len(extra),
        )
        + name
        + extra
    )


def _central_header(entry: ZipEntry, offset: int) -> bytes:
    name = entry.name.encode("utf-8")
    big, far = entry.size >= _LIMIT_32, offset >= _LIMIT_32
    values = ([entry.size, entry.size] if big else []) + ([offset] if far else [])
    extra = struct.pack(f"<HH{len(values)}Q", 1, 8 * len(values), *values) if values else b""
    size = _LIMIT_32 if big else entry.size
    version = _version(big or far)
    return (
        struct.pack(
            "<IHHHHHHIIIHHHHHII",
            0x02014B50,
            _MADE_BY_UNIX | version,
            version,
            _UTF8_NAMES,
            0,
            0,
            _DOS_DATE,
            entry.crc32,
            size,
            size,
            len(name),
            len(extra),
            0,
            0,
            0,
            _REGULAR_FILE_0644,
            _LIMIT_32 if far else offset,
        )
        + name
        + extra
    )


def _end_records(count: int, size: int, offset: int) -> bytes:
    records = b""
    if offset >= _LIMIT_32 or size >= _LIMIT_32 or count >= _LIMIT_16:
        records += struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, _MADE_BY_UNIX | 45, 45, 0, 0, count, count, size, offset)
        records += struct.pack("<IIQI", 0x07064B50, 0, offset + size, 1)
    entries = min(count, _LIMIT_16)
    return records + struct.pack(
        "<IHHHHIIH", 0x06054B50, 0, 0, entries, entries, min(size, _LIMIT_32), min(offset, _LIMIT_32), 0
    )


def blob_entry(name: str, sha256: str, size: int, crc32: int) -> ZipEntry:
    """An entry whose content is a whole blob."""
    return ZipEntry(name, crc32, size, (BlobSlice(sha256, 0, size),))
