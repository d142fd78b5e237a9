"""JSON Lines: one object per line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from artifacts.errors import FileBroken
from artifacts.json_objects import unique_members
from train.records import Faults, Limits, Row
from train.text_lines import Line, decode, lines, too_long

_SURROGATE = re.compile("[\ud800-\udfff]")


def read(file: BinaryIO, limits: Limits, faults: Faults) -> Iterator[tuple[int, Row]]:
    """The rows with their numbers; those that are not valid go to `faults`. Empty lines are no rows.

    Raises:
        FileBroken: the whole file can not be read as JSON Lines.
        TooLarge: see `lines`.
    """
    number = 0
    for line in lines(file, limits):
        if line.whole and line.raw.isspace():
            continue
        number += 1
        if number == 1 and line.raw.lstrip().startswith(b"["):
            raise FileBroken(
                "The file begins with a JSON array, not with an object.",
                hint="Write one object per line, with no commas between the lines.",
            )
        try:
            row = _parse(line, limits)
        except ValueError as error:
            faults.add(number, f"line {line.number}: {error}")
        else:
            yield number, row


def _parse(line: Line, limits: Limits) -> Row:
    """Raises ValueError, which says what is wrong."""
    if not line.whole:
        raise ValueError(too_long(limits))
    text = decode(line.raw)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error.msg} at place {error.pos + 1}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"is a JSON {_NAMES[type(value)]}, not an object")
    if "\\u" in text and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("has an unpaired surrogate, which is not valid text")
    return value


_NAMES = {list: "array", str: "string", int: "number", float: "number", bool: "truth value", type(None): "null"}


def _twice(name: str) -> ValueError:
    return ValueError(f"has the key {name[:80]!r} twice")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"has {name}, which is no JSON number")


_DECODER = json.JSONDecoder(object_pairs_hook=unique_members(_twice), parse_constant=_refuse_constant)
