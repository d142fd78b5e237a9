"""Values of a row: which are allowed, and what type a column of them has."""

from __future__ import annotations

import math
from typing import Any

MAX_DEPTH = 32
MESSAGE_KEYS = frozenset({"role", "content"})
_INT64 = range(-(2**63), 2**63)


def fault_of(value: Any, depth: int = 0) -> str | None:
    """What is wrong with a value, if anything: no number that JSON or 64 bits can not hold, no endless nesting."""
    if isinstance(value, float):
        return None if math.isfinite(value) else "NaN or infinity, which is no JSON number"
    if isinstance(value, int):
        return None if value in _INT64 else "an integer that does not fit in 64 bits"
    if not isinstance(value, list | dict):
        return None
    if depth == MAX_DEPTH:
        return f"nested deeper than {MAX_DEPTH} levels"
    items = value.values() if isinstance(value, dict) else value
    return next((fault for item in items if (fault := fault_of(item, depth + 1)) is not None), None)


def type_of(value: Any) -> str:
    """The name of a value's type; "messages" is a list of objects that have a role and a content, both text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "integer"
    if isinstance(value, float):
        return "number"
    if isinstance(value, str):
        return "string"
    return _type_of_list(value) if isinstance(value, list) else "object"


def _type_of_list(values: list[Any]) -> str:
    if not values:
        return "list"
    if all(isinstance(value, str) for value in values):
        return "list<string>"
    if all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return "list<integer>"
    return "messages" if all(map(is_message, values)) else "list"


def is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == MESSAGE_KEYS and all(isinstance(v, str) for v in value.values())


def common_type(types: set[str]) -> str:
    """The type of a column whose values have these; "mixed" if no one type covers them."""
    rest = types - {"null"}
    if rest == {"integer", "number"}:
        return "number"
    if len(rest) == 2 and "list" in rest:  # an empty list is a list of anything
        other = (rest - {"list"}).pop()
        return other if other.startswith("list<") or other == "messages" else "mixed"
    if len(rest) > 1:
        return "mixed"
    return rest.pop() if rest else "null"
