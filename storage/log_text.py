"""The text of an attempt's log: always valid UTF-8, as long as what was written, and bounded when it is kept.

A byte that belongs to no UTF-8 character becomes one question mark, and so does NUL, which no database stores in a
text. So an offset in the log file is the same offset in the text, in bytes, whoever decodes which part of it.
"""

from __future__ import annotations

import codecs
import os
import re
from dataclasses import dataclass
from pathlib import Path

LIMIT = 16 << 20  # bytes of a log that is kept
HEAD_BYTES = LIMIT // 2 - 128
TAIL_BYTES = LIMIT // 2 - 128
MARK_WINDOW = 120  # no mark is longer
_ERRORS = "rankwise-question-marks"
_MARK = re.compile(rb"\n\[\xe2\x80\xa6 (\d{1,20}) bytes of the log are left out \xe2\x80\xa6\]\n")


def _question_marks(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "?" * (error.end - error.start), error.end


codecs.register_error(_ERRORS, _question_marks)


def decode(data: bytes) -> str:
    """All of `data` as text of the same number of bytes."""
    return data.decode("utf-8", _ERRORS).replace("\0", "?")


def decode_start(data: bytes) -> tuple[str, int]:
    """As much of `data` as is whole characters, and the bytes that it took: the next one may still be written."""
    decoder = codecs.getincrementaldecoder("utf-8")(_ERRORS)
    text = decoder.decode(data)
    waiting = len(decoder.getstate()[0])
    return text.replace("\0", "?"), len(data) - waiting


def mark(left_out: int) -> str:
    """The line that stands for `left_out` bytes."""
    return f"\n[… {left_out} bytes of the log are left out …]\n"


def read_bounded(path: Path) -> bytes:
    """The log's text in UTF-8: whole, or of one that is longer than `LIMIT` the beginning, a mark, and the end.

    Raises:
        OSError: the file can not be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size <= LIMIT:
            return decode(file.read(size)).encode()
        head = file.read(HEAD_BYTES)
        file.seek(size - TAIL_BYTES)
        tail = file.read(TAIL_BYTES)
    return (decode(head) + mark(size - HEAD_BYTES - TAIL_BYTES) + decode(tail)).encode()


@dataclass(frozen=True, slots=True)
class KeptText:
    """Where the bytes of a log are in what was kept of it.

    Attributes:
        size: bytes that were kept, the mark among them.
        left_out: bytes that were not.
    """

    size: int
    left_out: int = 0

    @classmethod
    def of(cls, size: int, after_head: bytes) -> KeptText:
        """Read from the bytes that stand at `HEAD_BYTES` (the first `MARK_WINDOW` of them)."""
        found = _MARK.match(after_head)
        left_out = int(found.group(1)) if found else 0
        if found and size == HEAD_BYTES + len(mark(left_out).encode()) + TAIL_BYTES:
            return cls(size, left_out)
        return cls(size)

    def resume(self, offset: int) -> tuple[int, int]:
        """For a reader who has the log up to `offset`: (bytes that it misses for ever, where to go on in what is kept).

        One that has no more than the beginning finds the mark in the text itself, so it misses none.
        """
        if not self.left_out or offset <= HEAD_BYTES:
            return 0, min(offset, self.size)
        tail_at = HEAD_BYTES + len(mark(self.left_out).encode())
        tail_offset = HEAD_BYTES + self.left_out
        return max(0, tail_offset - offset), min(tail_at + max(0, offset - tail_offset), self.size)
