"""Lines of a text file that may be packed with gzip and may be hostile: each bounded, and all of them together."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from artifacts.errors import FieldError, FileBroken, TooLarge
from train.records import Limits

GZIP_MAGIC = b"\x1f\x8b"
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class Line:
    """A line with its end, and its number from 1; only the beginning of it if it was too long."""

    number: int
    raw: bytes
    whole: bool = True


def unpacked(file: BinaryIO) -> BinaryIO:
    """The file, or what gzip packed into it. Begins at the start."""
    file.seek(0)
    packed = file.read(2) == GZIP_MAGIC
    file.seek(0)
    return cast("BinaryIO", gzip.GzipFile(fileobj=file)) if packed else file


def lines(file: BinaryIO, limits: Limits) -> Iterator[Line]:
    """The lines from the start, without a byte-order mark.

    Raises:
        FileBroken: UTF-16, or a gzip file that is cut off or damaged.
        TooLarge: more bytes than allowed.
    """
    try:
        yield from _lines(unpacked(file), limits)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FileBroken(f"The gzip file is cut off or damaged: {error}.") from error


def _lines(text: BinaryIO, limits: Limits) -> Iterator[Line]:
    total = number = 0
    while raw := text.readline(limits.max_row_bytes + 1):
        number += 1
        total += len(raw)
        whole = raw.endswith(b"\n") or len(raw) <= limits.max_row_bytes
        if number == 1:
            if raw.startswith(_UTF16):
                message = "is UTF-16"
                raise FileBroken(
                    f"The file {message}.", hint="Save it as UTF-8.", errors=[FieldError("line 1", message)]
                )
            raw = raw.removeprefix(codecs.BOM_UTF8)
        yield Line(number, raw, whole)
        while not whole:
            rest = text.readline(limits.max_row_bytes)
            total += len(rest)
            _check_size(total, limits)
            whole = not rest or rest.endswith(b"\n")
        _check_size(total, limits)


def _check_size(total: int, limits: Limits) -> None:
    if total > limits.max_bytes:
        raise TooLarge(f"Unpacked, the file is over the limit of {limits.max_bytes} bytes.")


def too_long(limits: Limits) -> str:
    return f"is over the limit of {limits.max_row_bytes} bytes"


def decode(raw: bytes) -> str:
    """The text of UTF-8 bytes.

    Raises:
        ValueError: says which byte is wrong, and at which place of the line.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte 0x{raw[error.start]:02x} at place {error.start + 1} is not UTF-8") from error
