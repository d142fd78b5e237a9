"""A file that is laid out but not written: bytes made here and slices of blobs, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from artifacts.rank_cut import Pieces
from storage.blobs import BlobStore

_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class BlobSlice:
    """Bytes `start` to `stop` (exclusive) of a blob."""

    sha256: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class BlobPieces:
    """What `pieces` keep of a blob."""

    sha256: str
    pieces: Pieces

    def __len__(self) -> int:
        return self.pieces.size

    def read(self, blobs: BlobStore, begin: int, end: int) -> Iterator[bytes]:
        """Bytes `begin` to `end` of what is kept, in one pass over the part of the blob that holds them."""
        chunks = blobs.stream(self.sha256, *self.pieces.hull(begin, end))
        yield from self.pieces.sift(chunks, begin, end)


@dataclass(frozen=True)
class MadeBytes:
    """Bytes that are computed from blobs when they are read: `size` of them."""

    size: int
    make: Callable[[BlobStore], bytes]

    def __len__(self) -> int:
        return self.size

    def read(self, blobs: BlobStore, begin: int, end: int) -> Iterator[bytes]:
        """Bytes `begin` to `end` of what is made."""
        made = self.make(blobs)
        for start in range(begin, end, _CHUNK_BYTES):
            yield made[start : min(start + _CHUNK_BYTES, end)]


Segment = bytes | BlobSlice | BlobPieces | MadeBytes


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
        elif isinstance(segment, BlobPieces | MadeBytes):
            yield from segment.read(blobs, begin, end)
        else:
            yield from blobs.stream(segment.sha256, segment.start + begin, segment.start + end)
