"""Range, If-Range and If-None-Match of RFC 9110, for answers whose length is known ahead."""

from __future__ import annotations

import re
from dataclasses import dataclass

from artifacts.errors import RangeInvalid

_RANGE = re.compile(r"bytes=[ \t]*(\d{0,19})-(\d{0,19})[ \t]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `start` to `stop` (exclusive) of `total`."""

    start: int
    stop: int
    total: int

    @property
    def content_range(self) -> str:
        return f"bytes {self.start}-{self.stop - 1}/{self.total}"


def parse_range(header: str | None, total: int) -> ByteRange | None:
    """The one range that `header` asks for; None means the whole: no header, one not understood, or several ranges.

    Raises:
        RangeInvalid: the range begins behind the end.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or match.group(1) == match.group(2) == "":
        return None
    first, last = match.groups()
    if first == "":
        start, stop = max(0, total - int(last)), total
    else:
        start, stop = int(first), min(int(last) + 1, total) if last else total
        if last and int(last) < start:
            return None  # RFC 9110, 14.1.1: such a range is invalid and is ignored
    if start >= total or (first == "" and int(last) == 0):
        raise RangeInvalid(f"The range {header!r} lies outside of the {total} bytes.")
    return ByteRange(start, stop, total)


def etag_matches(header: str | None, etag: str) -> bool:
    """Whether If-None-Match names `etag` (weak comparison) or anything at all (`*`)."""
    if header is None:
        return False
    if header.strip() == "*":
        return True
    return any(item.strip().removeprefix("W/") == etag.removeprefix("W/") for item in header.split(","))


def range_applies(if_range: str | None, etag: str) -> bool:
    """Whether a Range header counts: no If-Range, or one that names `etag` (strong comparison)."""
    return if_range is None or (if_range.strip() == etag and not etag.startswith("W/"))
