"""JSON objects that name every member once: readers differ in which of two values they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Object = dict[str, Any]


def unique_members(refuse: Callable[[str], Exception]) -> Callable[[list[tuple[str, Any]]], Object]:
    """The `object_pairs_hook` of json that raises `refuse(name)` of the first name that is there a second time."""

    def unique(pairs: list[tuple[str, Any]]) -> Object:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for name, _ in pairs:
                if name in seen:
                    raise refuse(name)
                seen.add(name)
        return result

    return unique
