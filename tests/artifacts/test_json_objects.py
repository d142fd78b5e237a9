from __future__ import annotations

import json

import pytest

from app.json_body import parse_json as parse_body
from artifacts.errors import MalformedRequest
from artifacts.json_objects import unique_members


class Counted(str):
    """Text that counts how often it is compared."""

    __slots__ = ()
    comparisons = 0

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_objects_name_every_member_once() -> None:
    hook = unique_members(lambda name: ValueError(f"{name} twice"))
    assert json.loads('{"a": {"a": 1}, "b": [{"a": 2}]}', object_pairs_hook=hook) == {"a": {"a": 1}, "b": [{"a": 2}]}
    for text in ('{"x": 1, "b": 1, "b": 2, "x": 2}', '[{"b": {"a": 1}, "b": 2}]'):
        with pytest.raises(ValueError, match="b twice"):
            json.loads(text, object_pairs_hook=hook)


def test_a_name_twice_is_found_in_one_pass() -> None:
    count = 3000
    pairs = [(Counted(number), number) for number in range(count)] + [(Counted(count - 1), 0)]
    Counted.comparisons = 0
    with pytest.raises(ValueError, match="2999"):
        unique_members(ValueError)(pairs)
    assert Counted.comparisons < count


def test_bodies_are_read_by_it() -> None:
    with pytest.raises(MalformedRequest, match="'b' twice in one object"):
        parse_body(b'{"a": 1, "b": 1, "b": 2}')
