"""What text a column takes. PostgreSQL refuses U+0000 and over-long text where SQLite does not, so both refuse here."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from artifacts.errors import FieldError, RequestInvalid

_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def storable(value: str, pointer: str, limit: int | None = None) -> str:
    """`value` itself, if both databases can hold it in a column of `limit` characters.

    Raises:
        RequestInvalid: U+0000, an unpaired surrogate, or more than `limit` characters.
    """
    problem: str | None = None
    if "\x00" in value:
        problem = "contains the character U+0000, which can not be stored"
    elif _SURROGATE.search(value):
        problem = "contains an unpaired surrogate, which is not valid text"
    elif limit is not None and len(value) > limit:
        problem = f"has {len(value)} characters; at most {limit} are allowed"
    if problem is not None:
        raise RequestInvalid(f"{pointer} {problem}", errors=[FieldError(pointer, problem)])
    return value


def is_storable(value: str) -> bool:
    """Whether stored text could equal `value`: a search for text that can not be stored finds nothing."""
    return "\x00" not in value and not _SURROGATE.search(value)


def fold(value: str) -> str:
    """The form in which names are searched, the same on every database whatever its own idea of lower case."""
    return value.casefold()


def short_digest(value: str) -> str:
    """32 hex digits that stand for a text where an index has no room for it."""
    return hashlib.sha256(value.encode("utf-8")).hexdigest()[:32]


def dump_json(value: Any) -> str:
    """JSON that both databases take.

    Raises:
        RequestInvalid: NaN or an infinity, U+0000 or an unpaired surrogate: JSONB holds none of them.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except ValueError as error:
        raise RequestInvalid(
            f"a value can not be stored as JSON: {error}", hint="Send finite numbers; NaN and infinities are not JSON."
        ) from error
    if _SURROGATE.search(text) or ("\\u0000" in text and _ESCAPED_NUL.search(text)):
        raise RequestInvalid(
            "a value contains U+0000 or an unpaired surrogate, which can not be stored", hint="Remove the character."
        )
    return text
