"""The deltas of foreign files are those that diffusers' own converters give, where it converts them."""

from __future__ import annotations

import pytest

from scripts.formats_engines import against_diffusers, diffusers_candidates
from scripts.formats_figures import MAX_DIFFERENCE

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

CANDIDATES = diffusers_candidates()


@pytest.mark.parametrize("name", sorted(CANDIDATES))
def test_deltas_are_those_of_diffusers(name: str) -> None:
    found = against_diffusers(name, CANDIDATES[name])
    assert found.modules >= 1
    assert found.difference <= MAX_DIFFERENCE


def test_there_is_something_to_compare() -> None:
    assert len(CANDIDATES) >= 51
