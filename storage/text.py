"""What text a column takes. PostgreSQL refuses U+0000 and over-long text where SQLite does not, so both refuse here."""

from __future__ import annotations

import hashlib
import json
import math
import re
from itertools import islice
from typing import Any

from artifacts.errors import FieldError, RequestInvalid

_SURROGATE = re.compile("[\ud800-\udfff]")
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_MEND_CHARACTERS, _MEND_ITEMS, _MEND_DEPTH = 32 * 1024, 1000, 8
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


def mended(value: Any, depth: int = _MEND_DEPTH) -> Any:
    """A value that `dump_json` takes, whatever `value` is: of what failures say, which must be written in any case.

    Characters that can not be stored become question marks; what is too long, or too deep, is cut.
    """
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict) and depth > 0:
        return {mended(str(key)): mended(item, depth - 1) for key, item in islice(value.items(), _MEND_ITEMS)}
    if isinstance(value, list | tuple) and depth > 0:
        return [mended(item, depth - 1) for item in value[:_MEND_ITEMS]]
    return _UNSTORABLE.sub("?", str(value)[:_MEND_CHARACTERS])


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
