"""CSV as RFC 4180 has it: a header, commas, double quotes. All values are text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import BinaryIO

from artifacts.errors import FieldError, FileBroken
from train.census import check_header
from train.records import Faults, Limits, Row
from train.text_lines import decode, lines, too_long


class _Unreadable(Exception):
    """A line that is no text: the record that it belongs to is given up, the next line begins a new one."""


class _TooLong(Exception):
    """A record that does not end: after it nobody can tell what is quoted and what is not."""


class _Feed:
    """Gives the csv module one line at a time, and counts the bytes of the record that it is reading."""

    def __init__(self, file: BinaryIO, limits: Limits) -> None:
        self._lines = lines(file, limits)
        self._limit = limits.max_row_bytes
        self._size = 0
        self.begun = 0  # line number at which the record begins
        self.line = 0

    def begin(self) -> None:
        self.begun, self._size = self.line + 1, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.line = line.number
        self._size += len(line.raw)
        if not line.whole or self._size > self._limit:
            raise _TooLong
        try:
            return decode(line.raw)
        except ValueError as error:
            raise _Unreadable(f"line {line.number}: {error}") from error


def read_header(file: BinaryIO, limits: Limits) -> list[str]:
    """The names of the columns.

    Raises:
        FileBroken: no header, or none that is valid.
    """
    return _header(*_open(file, limits), limits)


def read(file: BinaryIO, limits: Limits, faults: Faults) -> Iterator[tuple[int, Row]]:
    """The rows with their numbers; those that are not valid go to `faults`. Empty lines are no rows.

    Raises:
        FileBroken: no header, or none that is valid; gzip that is damaged.
        TooLarge: see `lines`.
    """
    feed, reader = _open(file, limits)
    header = _header(feed, reader, limits)
    number = 0
    while True:
        feed.begin()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except _TooLong:
            fault = f"{too_long(limits)}; is a quote left open? What follows is not read"
            faults.add(number + 1, f"line {feed.begun}: {fault}")
            return
        except (_Unreadable, csv.Error) as error:
            number += 1
            place = "" if isinstance(error, _Unreadable) else f"line {feed.begun}: "
            faults.add(number, f"{place}{error}")
            continue
        if not cells:
            continue
        number += 1
        if len(cells) != len(header):
            faults.add(number, f"line {feed.begun}: has {len(cells)} cells; the header has {len(header)}")
        else:
            yield number, dict(zip(header, cells, strict=True))


def _open(file: BinaryIO, limits: Limits) -> tuple[_Feed, Iterator[list[str]]]:
    # The limit of the csv module is one for the whole process. Records are bounded by the feed; this must not be less.
    csv.field_size_limit(max(csv.field_size_limit(), limits.max_row_bytes))
    feed = _Feed(file, limits)
    return feed, csv.reader(feed, strict=True)


def _header(feed: _Feed, reader: Iterator[list[str]], limits: Limits) -> list[str]:
    names: list[str] = []
    try:
        while not names:
            feed.begin()
            names = next(reader)
    except StopIteration:
        raise FileBroken("The file is empty: it has not even a header.") from None
    except (_TooLong, _Unreadable, csv.Error) as error:
        message = too_long(limits) if isinstance(error, _TooLong) else str(error)
        raise FileBroken(
            f"The header can not be read: {message}.",
            hint="A CSV file begins with one line of column names, in UTF-8.",
            errors=[FieldError("header", message)],
        ) from error
    if len(names) == 1 and any(separator in names[0] for separator in ";\t"):
        message = "seems to be separated by semicolons or tabs"
        raise FileBroken(
            f"The header {message}.", hint="Export the file with commas.", errors=[FieldError("header", message)]
        )
    check_header(names, limits.max_columns)
    return names
