from __future__ import annotations

import json
import math
from typing import Any

import pytest

from artifacts.errors import RequestInvalid
from storage.text import dump_json, fold, is_storable, mended, storable


@pytest.mark.parametrize("value", ["", "plain", "Ünïcødé 漢字 😀", "tab\tand\nline", "\\u0000 written out"])
def test_ordinary_text_passes_unchanged(value: str) -> None:
    assert storable(value, "/name") == value
    assert is_storable(value)
    assert json.loads(dump_json({"k": value})) == {"k": value}


@pytest.mark.parametrize("value", ["a\x00b", "\ud800", "x\udfff"])
def test_text_that_postgres_refuses_is_refused_for_all(value: str) -> None:
    assert not is_storable(value)
    with pytest.raises(RequestInvalid) as caught:
        storable(value, "/name")
    assert caught.value.errors[0].pointer == "/name"
    with pytest.raises(RequestInvalid):
        dump_json({"deep": [{"k": value}]})
    with pytest.raises(RequestInvalid):
        dump_json({value: 1})


def test_nul_after_an_escaped_backslash_is_found() -> None:
    with pytest.raises(RequestInvalid):
        dump_json("\\\x00")


def test_a_limit_counts_characters() -> None:
    assert storable("ä" * 200, "/name", 200)
    with pytest.raises(RequestInvalid, match="has 201 characters; at most 200"):
        storable("ä" * 201, "/name", 200)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_lacks_are_refused(value: float) -> None:
    with pytest.raises(RequestInvalid, match="not JSON"):
        dump_json({"error": value})


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        ({"detail": "a\x00b\ud800", "n\x00": [1, True, None, 0.5]}, {"detail": "a?b?", "n?": [1, True, None, 0.5]}),
        ([math.nan, -math.inf], ["nan", "-inf"]),
        ("ä" * 10**6, "ä" * 32 * 1024),
        (list(range(2000)), list(range(1000))),
        ({"where": ("x", ValueError("y\x00"))}, {"where": ["x", "y?"]}),
    ],
)
def test_what_must_be_written_in_any_case_can_be(value: Any, stored: Any) -> None:
    assert mended(value) == stored
    assert json.loads(dump_json(mended(value))) == stored


def test_what_is_too_deep_becomes_text() -> None:
    deep: list[Any] = []
    for _ in range(500):
        deep = [deep]
    dump_json(mended(deep))


def test_folding_knows_more_than_ascii() -> None:
    assert fold("STRASSE ÉLAN") == fold("straße élan")
