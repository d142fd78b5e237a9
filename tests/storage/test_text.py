from __future__ import annotations

import json

import pytest

from artifacts.errors import RequestInvalid
from storage.text import dump_json, fold, is_storable, storable


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


def test_folding_knows_more_than_ascii() -> None:
    assert fold("STRASSE ÉLAN") == fold("straße élan")
