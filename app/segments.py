"""A file that is laid out but not written: bytes made here and slices of blobs, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from storage.blobs import BlobStore


@dataclass(frozen=True, slots=True)
class BlobSlice:
    """Bytes `start` to `stop` (exclusive) of a blob."""

    sha256: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


Segment = bytes | BlobSlice


def total_size(segments: Sequence[Segment]) -> int:
    """Bytes of all segments together."""
    return sum(map(len, segments))


def read_segments(blobs: BlobStore, segments: Sequence[Segment], start: int, stop: int) -> Iterator[bytes]:
    """The bytes from `start` to `stop` (exclusive) of the laid out file."""
    position = 0
    for segment in segments:
        begin, end = max(start - position, 0), min(stop - position, len(segment))
        position += len(segment)
        if begin >= end:
            continue
        if isinstance(segment, bytes):
            yield segment[begin:end]
        else:
            yield from blobs.stream(segment.sha256, segment.start + begin, segment.start + end)
