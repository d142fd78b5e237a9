from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.splits import canonical, split_of

ROWS = [{"text": f"row {number}", "label": number % 3} for number in range(2000)]


def test_the_canonical_form_is_fixed() -> None:
    assert canonical({"b": [1, "é"], "a": None, "c": 0.5}) == '{"b":[1,"é"],"c":0.5}'.encode()
    digest = hashlib.sha256(b'{"text":"a"}').digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    assert split_of({"text": "a"}, place - 1e-9) == "train"
    assert split_of({"text": "a"}, place + 1e-9) == "validation"


def test_the_share_is_about_the_fraction_and_the_ends_are_exact() -> None:
    held_out = sum(split_of(row, 0.1) == "validation" for row in ROWS)
    assert 160 <= held_out <= 240  # 200 ± 3 standard deviations
    assert {split_of(row, 0.0) for row in ROWS} == {"train"}
    assert {split_of(row, 1.0) for row in ROWS} == {"validation"}


def test_rows_never_move() -> None:
    before = {canonical(row): split_of(row, 0.2) for row in ROWS}
    more = [*ROWS, *({"text": f"new {number}"} for number in range(500))]
    random.shuffle(more)
    after = {canonical(row): split_of(row, 0.2) for row in more}
    assert {key: after[key] for key in before} == before


def test_a_larger_fraction_keeps_what_was_held_out() -> None:
    for row in ROWS[:300]:
        sides = [split_of(row, fraction / 20) for fraction in range(21)]
        assert sides == sorted(sides)


@given(st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=5), max_size=6), st.randoms())
def test_the_order_of_keys_and_nulls_do_not_matter(row: dict[str, Any], dice: random.Random) -> None:
    row = {key: value for key, value in row.items() if not (isinstance(value, str) and _has_surrogate(key + value))}
    row = {key: value for key, value in row.items() if not _has_surrogate(key)}
    keys = list(row)
    dice.shuffle(keys)
    other = {key: row[key] for key in keys if row[key] is not None} | {"another": None}
    assert split_of(row, 0.5) == split_of(other, 0.5) or "another" in row


def _has_surrogate(value: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in value)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_fraction_is_between_0_and_1(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_of({"a": 1}, fraction)
