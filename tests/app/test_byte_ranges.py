"""Range and conditional headers, case by case."""

from __future__ import annotations

import pytest

from app.byte_ranges import ByteRange, etag_matches, parse_range, range_applies
from artifacts.errors import RangeInvalid

TOTAL = 100


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=0-99", (0, 100)),
        ("bytes=0-1000000", (0, 100)),
        ("bytes=99-", (99, 100)),
        ("bytes=-1", (99, 100)),
        ("bytes=-1000", (0, 100)),
        ("BYTES= 5-9", (5, 10)),
        ("bytes=0-9223372036854775807", (0, 100)),
    ],
)
def test_one_range(header: str, expected: tuple[int, int]) -> None:
    assert parse_range(header, TOTAL) == ByteRange(*expected, TOTAL)


@pytest.mark.parametrize(
    "header",
    [None, "", "bytes=-", "bytes=5", "bytes=a-b", "bytes=9-5", "items=0-1", "bytes=0-1,5-6", "bytes=0-" + "9" * 40],
)
def test_what_is_not_understood_means_the_whole(header: str | None) -> None:
    assert parse_range(header, TOTAL) is None


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=100-200", "bytes=-0"])
def test_ranges_behind_the_end(header: str) -> None:
    with pytest.raises(RangeInvalid):
        parse_range(header, TOTAL)


def test_an_empty_file_has_no_ranges() -> None:
    for header in ("bytes=0-", "bytes=-5"):
        with pytest.raises(RangeInvalid):
            parse_range(header, 0)


def test_etags() -> None:
    assert etag_matches('"a", W/"b"', '"b"')
    assert etag_matches(" * ", '"b"')
    assert not etag_matches('"a"', '"b"')
    assert not etag_matches(None, '"b"')
    assert range_applies(None, '"b"')
    assert range_applies('"b"', '"b"')
    assert not range_applies('W/"b"', '"b"'), "a weak tag can not vouch for bytes"
