from __future__ import annotations

import uuid

import pytest

from storage.ids import is_id, new_id


def test_an_id_is_a_prefix_and_a_uuid_of_version_7() -> None:
    prefix, _, digits = new_id("adp").partition("_")
    assert prefix == "adp"
    assert uuid.UUID(hex=digits).version == 7


def test_later_ids_sort_after_earlier_ones() -> None:
    ids = [new_id("job") for _ in range(500)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 500


@pytest.mark.parametrize("prefix", ["", "ad", "adpx", "ADP", "a_p", "äöü"])
def test_a_prefix_has_three_lower_case_letters(prefix: str) -> None:
    with pytest.raises(ValueError, match="three lower-case letters"):
        new_id(prefix)


def test_is_id_looks_at_the_form() -> None:
    made = new_id("adp")
    assert is_id(made)
    assert is_id(made, "adp")
    assert not is_id(made, "job")
    assert not is_id(made + "0")
    assert not is_id("adp_xyz")
